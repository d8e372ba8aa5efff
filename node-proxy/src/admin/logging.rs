//! The process's log on standard error, and its level, which can be changed while it runs.

use std::sync::Arc;

use parking_lot::Mutex;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt};

use crate::config::LogFormat;

/// Changes what is logged.
#[derive(Clone)]
pub struct Logging {
    filter: reload::Handle<EnvFilter, Registry>,
    level: Arc<Mutex<String>>,
}

/// Why a level cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// Not the syntax of `EnvFilter`.
    #[error("{0}")]
    Syntax(#[from] tracing_subscriber::filter::ParseError),
    /// The subscriber is gone.
    #[error("{0}")]
    Gone(#[from] reload::Error),
    /// Another part of the process logs already.
    #[error("{0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

impl Logging {
    /// Starts the log of the process.
    pub fn start(level: &str, format: LogFormat) -> Result<Self, LoggingError> {
        let (filter, handle) = reload::Layer::new(level.parse::<EnvFilter>()?);
        let registry = tracing_subscriber::registry().with(filter);
        let layer = fmt::layer().with_writer(std::io::stderr);
        match format {
            LogFormat::Text => registry.with(layer.with_ansi(false)).try_init()?,
            LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init()?,
        }
        Ok(Self {
            filter: handle,
            level: Arc::new(Mutex::new(level.to_owned())),
        })
    }

    /// What is logged now.
    pub fn level(&self) -> String {
        self.level.lock().clone()
    }

    /// Replaces it.
    pub fn set_level(&self, level: &str) -> Result<(), LoggingError> {
        self.filter.reload(level.parse::<EnvFilter>()?)?;
        level.clone_into(&mut self.level.lock());
        Ok(())
    }
}

//! Commands about Warren in a Kubernetes cluster.

mod agents;
pub(crate) mod check;
pub(crate) mod install;
mod metrics;
pub(crate) mod stat;
pub(crate) mod uninstall;

use std::process::ExitCode;

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::args::Cluster;
use crate::error::{Context, Result};

/// Runs a command to its end.
pub(crate) fn run(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    runtime.block_on(command)
}

/// The API server that the options, else the surroundings, name.
async fn connect(cluster: &Cluster) -> Result<Client> {
    let options = KubeConfigOptions {
        context: cluster.context.clone(),
        ..KubeConfigOptions::default()
    };
    let config = match &cluster.kubeconfig {
        Some(file) => {
            let file = Kubeconfig::read_from(file).context("the kubeconfig cannot be read")?;
            kube::Config::from_custom_kubeconfig(file, &options).await
        }
        None if cluster.context.is_some() => kube::Config::from_kubeconfig(&options).await,
        None => {
            let config = kube::Config::infer().await;
            return Client::try_from(config.context("no cluster is configured")?)
                .context("the cluster cannot be reached");
        }
    };
    Client::try_from(config.context("the kubeconfig cannot be used")?)
        .context("the cluster cannot be reached")
}

/// Label of every object of Warren's.
const PART_OF: &str = "app.kubernetes.io/part-of=warren";

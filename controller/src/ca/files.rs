//! The authority's directory: `root.crt`, `root.key`, `bundle-extra.pem`, `retired.pem` and `bundle.pem`.
//!
//! `root.crt` and `root.key` are the user's, or made here once. `bundle-extra.pem` is the user's.
//! `retired.pem` (roots that were replaced) and `bundle.pem` (all that is trusted; nodes mount it) are
//! written here; a root is taken out of trust by removing it from `retired.pem`.

use std::path::Path;

use rustls_pki_types::CertificateDer;

use super::root::{self, CaError, Roots, content};
use crate::enrolment::replace;

/// Reads the directory, makes a root if there is none, and brings `retired.pem` and `bundle.pem` up to date.
pub fn read(dir: &Path, trust_domain: &str) -> Result<Roots, CaError> {
    std::fs::create_dir_all(dir).map_err(io(dir))?;
    let (cert_path, key_path) = (dir.join("root.crt"), dir.join("root.key"));
    let load = |cert: &str, key: &str| {
        let cert = (&cert_path.display() as _, cert.as_bytes());
        root::load(cert, (&key_path.display(), key.as_bytes()), trust_domain)
    };
    let root = match (read_text(&cert_path)?, read_text(&key_path)?) {
        (Some(cert), Some(key)) => load(&cert, &key)?,
        (None, None) => {
            let made = root::make(trust_domain)?;
            // The key first: a certificate without key would stop the next start.
            write(&key_path, &made.key, 0o600)?;
            write(&cert_path, &made.certificate, 0o644)?;
            tracing::info!("made a root certificate, {}", cert_path.display());
            load(&made.certificate, &made.key)?
        }
        (Some(_), None) => {
            return Err(content(
                &key_path.display(),
                "is missing, but root.crt is there; add the key of that root",
            ));
        }
        (None, Some(_)) => {
            return Err(content(
                &cert_path.display(),
                "is missing, but root.key is there; add its certificate",
            ));
        }
    };
    let bundle_path = dir.join("bundle.pem");
    let before = certificates(&bundle_path)?;
    let retired_path = dir.join("retired.pem");
    let mut retired = certificates(&retired_path)?;
    if let Some(more) = root::retire(&retired, before.first(), &root) {
        tracing::info!(
            "the root was replaced; the old one stays trusted, see {}",
            retired_path.display()
        );
        write(&retired_path, &root::pem(&more), 0o644)?;
        retired = more;
    }
    let extra = certificates(&dir.join("bundle-extra.pem"))?;
    let roots = Roots::new(root, extra, retired);
    if !before
        .iter()
        .map(AsRef::as_ref)
        .eq(roots.bundle.iter().map(Vec::as_slice))
    {
        write(&bundle_path, &roots.bundle_pem(), 0o644)?;
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CaError> {
    match read_text(path)? {
        Some(text) => root::certificates(&path.display(), text.as_bytes()),
        None => Ok(Vec::new()),
    }
}

fn read_text(path: &Path) -> Result<Option<String>, CaError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io(path)(e)),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    replace(path, text.as_bytes(), mode).map_err(io(path))
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::Io {
        path: path.clone(),
        source,
    }
}

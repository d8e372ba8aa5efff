//! Names: each pod's `/etc/hosts` and `/etc/resolv.conf` instead of a DNS server.
//!
//! The files are mounted over the originals, so they are rewritten in place and keep their inode. A reader must
//! never see an empty file: the new content is written over the old one, filled up with newlines to the old
//! length in the same write.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::cluster::{Cluster, Key, PodRecord};
use super::services::{addresses, all_slices, belongs_to, is_headless, takes_traffic};

/// The domain of Service names; the trust domain may differ.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// A Service name and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    namespace: String,
    name: String,
    addresses: Vec<IpAddr>,
}

/// The names of all Services; a headless one stands for its ready pods.
pub(crate) fn names(cluster: &Cluster) -> Vec<Name> {
    let names = cluster.services.iter().map(|(key, service)| {
        let (namespace, name) = key.clone();
        let addresses = if is_headless(service) {
            endpoints(cluster, key)
        } else {
            addresses(service)
        };
        Name {
            namespace,
            name,
            addresses,
        }
    });
    names.filter(|n| !n.addresses.is_empty()).collect()
}

fn endpoints(cluster: &Cluster, key: &Key) -> Vec<IpAddr> {
    let slices = all_slices(cluster)
        .into_iter()
        .filter(|slice| belongs_to(slice, key));
    let endpoints = slices.flat_map(|slice| slice.endpoints.unwrap_or_default());
    endpoints
        .filter(takes_traffic)
        .filter_map(|e| e.addresses.first()?.parse().ok())
        .collect()
}

/// A pod's `/etc/hosts`.
pub(crate) fn hosts(names: &[Name], (namespace, pod): &Key, record: &PodRecord) -> String {
    let mut text = String::from(
        "# written by warren lab\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    );
    for ip in &record.life.ips {
        line(&mut text, *ip, pod, "");
    }
    for Name {
        namespace: ns,
        name,
        addresses,
    } in names
    {
        let full = format!("{name}.{ns}.svc.{CLUSTER_DOMAIN} {name}.{ns}.svc {name}.{ns}");
        let short = if ns == namespace { name.as_str() } else { "" };
        for ip in addresses {
            line(&mut text, *ip, &full, short);
        }
    }
    text
}

fn line(text: &mut String, ip: IpAddr, names: &str, more: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}", format!("{ip}\t{names} {more}").trim_end());
}

/// A pod's `/etc/resolv.conf`. Nothing answers there, so that an unknown name fails at once.
pub(crate) fn resolv_conf(namespace: &str) -> String {
    format!(
        "# written by warren lab; names are in /etc/hosts\n\
         search {namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}\n\
         nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"
    )
}

/// IPv4 before IPv6 for `getaddrinfo`: programs that listen on 0.0.0.0 only are common, and behind a proxy a
/// client cannot see that it should try the other family.
pub(crate) const GAI_CONF: &str =
    "# written by warren lab: IPv4 first\nprecedence ::ffff:0:0/96 100\n";

/// What is mounted into a pod: (what, over what).
pub(crate) fn mounts(directory: &Path) -> Vec<(PathBuf, PathBuf)> {
    ["hosts", "resolv.conf", "gai.conf"]
        .map(|file| (directory.join(file), Path::new("/etc").join(file)))
        .into()
}

/// Rewrites a file that others have mounted; see the module's head.
pub(crate) fn rewrite(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    let old = usize::try_from(file.metadata()?.len()).unwrap_or(0);
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(bytes.len().max(old), b'\n');
    file.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_name_is_known_in_its_own_namespace_only() {
        let names = [Name {
            namespace: "demo".into(),
            name: "web".into(),
            addresses: vec!["10.96.0.10".parse().unwrap()],
        }];
        let record = super::super::services::tests::pod("node-1", &["10.202.1.5"]);
        let own = hosts(&names, &("demo".into(), "client".into()), &record);
        assert!(own.contains("10.202.1.5\tclient\n"), "{own}");
        let full = "10.96.0.10\tweb.demo.svc.cluster.local web.demo.svc web.demo";
        assert!(own.contains(&format!("{full} web\n")), "{own}");
        let other = hosts(&names, &("other".into(), "client".into()), &record);
        assert!(other.contains(&format!("{full}\n")), "{other}");
    }

    #[test]
    fn rewriting_keeps_the_inode_and_leaves_nothing_of_the_old() {
        let path = std::env::temp_dir().join(format!("warren-hosts-{}", std::process::id()));
        rewrite(&path, "long long text\n").unwrap();
        let before = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
        rewrite(&path, "short\n").unwrap();
        let after = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap());
        assert_eq!(before, after);
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim_end(), "short");
        std::fs::remove_file(&path).unwrap();
    }
}

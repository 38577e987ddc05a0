//! The upstream resolvers: the configured ones, or those of /etc/resolv.conf.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use tracing::warn;

/// The limit of the C library's resolver (resolv.conf(5), MAXNS).
const MOST: usize = 3;
const PORT: u16 = 53;

/// The resolvers to forward to. `shared`: queries leave from the pods' netns, where a loopback
/// address would be the pod's own. With an empty list, forwarded queries fail.
pub(super) fn resolvers(configured: &[SocketAddr], file: &Path, shared: bool) -> Vec<SocketAddr> {
    if !configured.is_empty() {
        return configured.to_vec();
    }
    let text = fs::read_to_string(file)
        .inspect_err(|error| warn!(file = %file.display(), %error, "cannot read the resolvers' addresses"));
    let mut found = parse(&text.unwrap_or_default());
    if shared {
        found.retain(|ip| !ip.is_loopback());
    }
    found.truncate(MOST);
    if found.is_empty() {
        warn!(file = %file.display(), "no resolver that pods could reach: names outside of the mesh will fail; \
            set dns.upstream (DNS_UPSTREAM)");
    }
    found.into_iter().map(|ip| SocketAddr::new(ip, PORT)).collect()
}

/// The addresses of the lines `nameserver ADDRESS` (resolv.conf(5)). Those with a scope belong to
/// one netns' links and are left out.
fn parse(text: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_count_and_nothing_else() {
        let text = "# nameserver 1.1.1.1\nsearch demo.svc.cluster.local\n  nameserver\t10.96.0.10 # kube-dns\n\
            nameserver fd00::a\nnameserver fe80::1%eth0\nnameserver\nnameserver x\noptions ndots:5\n";
        assert_eq!(parse(text), ["10.96.0.10".parse::<IpAddr>().unwrap(), "fd00::a".parse().unwrap()]);
    }

    #[test]
    fn a_loopback_resolver_is_no_use_from_a_pods_netns() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        fs::write(&file, "nameserver 127.0.0.53\nnameserver 10.96.0.10\n").unwrap();
        assert_eq!(resolvers(&[], &file, true), ["10.96.0.10:53".parse().unwrap()]);
        assert_eq!(resolvers(&[], &file, false).len(), 2);
        let configured = ["192.0.2.1:5300".parse().unwrap()];
        assert_eq!(resolvers(&configured, &file, true), configured);
        assert!(resolvers(&[], &dir.path().join("missing"), true).is_empty());
    }
}

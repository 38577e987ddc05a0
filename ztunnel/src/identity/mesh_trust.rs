//! Which trust domains are this mesh besides a workload's own one, and clients of which others are
//! accepted.
//!
//! * Aliases: a workload is the same in all of them, for handshakes and for policies. Configured, and
//!   `trustDomainAliases` of Istio's mesh configuration (ConfigMap `istio`, key `mesh`), where that
//!   is mounted.
//! * Accepted ones: the file that Istio's control plane writes (ConfigMap `istio-trust-domains`). It
//!   has those from which peers are accepted: the mesh's own ones, and those that a CA certificate
//!   was configured for. The last are other meshes. So its domains are no aliases: their clients may
//!   connect, and in a policy they are who they are.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use ztunnel_api::names::is_trust_domain;

use super::TrustDomains;
use crate::{
    config::{Config, TrustFiles},
    file_version::FileVersion,
    rarely::Rarely,
};

/// The interval at which the files are checked for changes.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// It is tried again at each interval, and said more rarely.
static UNREADABLE: Rarely = Rarely::every(Duration::from_mins(1));

/// In the list of accepted ones: all.
const ANY: &str = "*";

/// What is known at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    aliases: Arc<[Arc<str>]>,
    accepted: BTreeSet<String>,
}

/// What a file says of it.
type Said<T> = Result<T, InvalidFile>;

#[derive(Debug, thiserror::Error)]
enum InvalidFile {
    #[error("not a valid document: {0}")]
    Yaml(#[from] Box<serde_saphyr::Error>),
    #[error("{0:?} is no trust domain")]
    Domain(String),
}

/// The part of Istio's mesh configuration that matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct MeshConfig {
    trust_domain_aliases: Option<Vec<String>>,
}

/// The trust domains that count. Changes of the files take effect at once.
#[derive(Debug, Default)]
pub struct MeshTrust {
    configured: Arc<[Arc<str>]>,
    files: TrustFiles,
    known: watch::Sender<Known>,
}

impl MeshTrust {
    /// As configured, and as the files say. A file that does not exist, or is not valid, says nothing.
    #[must_use]
    pub fn open(config: &Config) -> Arc<Self> {
        Self::new(Arc::clone(&config.trust_domain_aliases), config.trust_files.clone())
    }

    /// Of these aliases alone.
    #[must_use]
    pub fn of_aliases(aliases: Arc<[Arc<str>]>) -> Arc<Self> {
        Self::new(aliases, TrustFiles::default())
    }

    fn new(configured: Arc<[Arc<str>]>, files: TrustFiles) -> Arc<Self> {
        let known = Known { aliases: Arc::clone(&configured), ..Known::default() };
        let trust = Self { configured, files, known: watch::Sender::new(known) };
        trust.read_mesh_config();
        trust.read_accepted();
        Arc::new(trust)
    }

    /// The mesh of trust domain `own`, at this moment.
    #[must_use]
    pub fn domains(&self, own: &Arc<str>) -> TrustDomains {
        TrustDomains::new(Arc::clone(own), Arc::clone(&self.known.borrow().aliases))
    }

    /// Whether a workload of trust domain `own` accepts clients of `client` at this moment.
    #[must_use]
    pub fn accepts(&self, own: &Arc<str>, client: &str) -> bool {
        self.known.borrow().accepts(own, client)
    }

    /// Resolves when it does not.
    pub async fn until_not_accepted(&self, own: &Arc<str>, client: &str) {
        let mut changes = self.known.subscribe();
        if changes.wait_for(|known| !known.accepts(own, client)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Is told of changes from now on.
    pub(crate) fn subscribe(&self) -> TrustChanges {
        TrustChanges(self.known.subscribe())
    }

    /// Applies changes of the files until `stop`. After an invalid change, and when a file is gone,
    /// what it said last stays in force.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let version = |path: &Option<PathBuf>| path.as_deref().and_then(FileVersion::of);
        // Unread as far as this knows: they may have changed since the start.
        let (mut mesh_config, mut accepted) = (None, None);
        loop {
            let now = (version(&self.files.mesh_config), version(&self.files.accepted));
            // One that cannot be read is read again: what it says may take something away.
            if now.0 != mesh_config && self.read_mesh_config() {
                mesh_config = now.0;
            }
            if now.1 != accepted && self.read_accepted() {
                accepted = now.1;
            }
            if stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await.is_none() {
                return;
            }
        }
    }

    /// Whether the file was read, valid or not.
    fn read_mesh_config(&self) -> bool {
        let aliases = |text: &str| -> Said<Arc<[Arc<str>]>> {
            let config: MeshConfig = serde_saphyr::from_str(text).map_err(Box::new)?;
            let told = config.trust_domain_aliases.into_iter().flatten().map(trust_domain);
            let mut all = self.configured.to_vec();
            for alias in told.map(|alias| Ok(Arc::from(alias?))).collect::<Said<Vec<Arc<str>>>>()? {
                if !all.contains(&alias) {
                    all.push(alias);
                }
            }
            Ok(all.into())
        };
        self.apply(self.files.mesh_config.as_deref(), aliases, |known, aliases| known.aliases = aliases)
    }

    /// The same.
    fn read_accepted(&self) -> bool {
        let domains = |text: &str| -> Said<BTreeSet<String>> {
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let domain =
                |line: &str| if line == ANY { Ok(line.to_owned()) } else { trust_domain(line.to_owned()) };
            lines.map(domain).collect()
        };
        self.apply(self.files.accepted.as_deref(), domains, |known, domains| known.accepted = domains)
    }

    fn apply<T>(
        &self,
        file: Option<&Path>,
        parse: impl FnOnce(&str) -> Said<T>,
        set: impl FnOnce(&mut Known, T),
    ) -> bool {
        let Some(path) = file else { return true };
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            // Not UTF-8: it was read.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                warn!(path = %path.display(), %error, "invalid trust domains; what the file said last stays in force");
                return true;
            }
            Err(error) => {
                if UNREADABLE.due().is_some() {
                    warn!(path = %path.display(), %error, "cannot read trust domains; trying again");
                }
                return false;
            }
        };
        match parse(&text) {
            Ok(said) => {
                self.known.send_if_modified(|known| {
                    let before = known.clone();
                    set(known, said);
                    let changed = *known != before;
                    if changed {
                        let Known { aliases, accepted } = &*known;
                        info!(path = %path.display(), ?aliases, ?accepted, "trust domains applied");
                    }
                    changed
                });
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "invalid trust domains; what the file said last stays in force");
            }
        }
        true
    }
}

fn trust_domain(name: String) -> Said<String> {
    if is_trust_domain(&name) { Ok(name) } else { Err(InvalidFile::Domain(name)) }
}

impl Known {
    fn accepts(&self, own: &Arc<str>, client: &str) -> bool {
        TrustDomains::new(Arc::clone(own), Arc::clone(&self.aliases)).contains(client)
            || self.accepted.contains(client)
            || self.accepted.contains(ANY)
    }
}

/// Tells of changes of a [`MeshTrust`].
#[derive(Debug)]
pub(crate) struct TrustChanges(watch::Receiver<Known>);

impl TrustChanges {
    /// Resolves at the next change. Never, once there can be none.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        folder: tempfile::TempDir,
        files: TrustFiles,
    }

    impl Rig {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = |name: &str| Some(folder.path().join(name));
            let files = TrustFiles { mesh_config: file("mesh"), accepted: file("trust-domains") };
            Self { folder, files }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.folder.path().join(name), text).unwrap();
        }

        fn open(&self) -> Arc<MeshTrust> {
            MeshTrust::new(["old.example".into()].into(), self.files.clone())
        }
    }

    fn own() -> Arc<str> {
        "new.example".into()
    }

    fn accepted(trust: &MeshTrust, domains: &[&str]) -> Vec<bool> {
        domains.iter().map(|domain| trust.accepts(&own(), domain)).collect()
    }

    #[test]
    fn without_files_the_own_one_and_its_configured_aliases_are_accepted() {
        let trust = Rig::new().open();
        assert_eq!(accepted(&trust, &["new.example", "old.example", "other.example"]), [true, true, false]);
    }

    #[test]
    fn an_alias_of_the_mesh_configuration_is_this_mesh_and_an_accepted_domain_is_not() {
        let rig = Rig::new();
        rig.write(
            "mesh",
            "trustDomain: new.example\ntrustDomainAliases: [older.example, old.example]\nx: {}\n",
        );
        rig.write("trust-domains", "new.example\nolder.example\r\n\n friend.example\n");
        let trust = rig.open();
        let domains = trust.domains(&own());
        let names: Vec<&str> = domains.names().map(|name| &**name).collect();
        assert_eq!(names, ["new.example", "old.example", "older.example"]);
        assert_eq!(accepted(&trust, &["older.example", "friend.example", "a.example"]), [true, true, false]);
    }

    #[test]
    fn a_mesh_configuration_without_aliases_leaves_the_configured_ones() {
        for mesh in ["{}", "trustDomain: new.example\n", "trustDomainAliases:\n", "trustDomainAliases: []\n"]
        {
            let rig = Rig::new();
            rig.write("mesh", mesh);
            assert_eq!(accepted(&rig.open(), &["old.example", "other.example"]), [true, false], "{mesh:?}");
        }
    }

    #[test]
    fn a_star_accepts_all() {
        let rig = Rig::new();
        rig.write("trust-domains", "*\n");
        let trust = rig.open();
        assert_eq!(accepted(&trust, &["any.example"]), [true]);
        assert!(!trust.domains(&own()).contains("any.example"), "but is nobody's alias");
    }

    #[test]
    fn what_is_not_valid_says_nothing() {
        for (mesh, list) in [
            ("trustDomainAliases: older.example", "a,b"),
            ("trustDomainAliases: ['*']", "spiffe://a"),
            ("\0", "*.example.org"),
            ("trustDomainAliases: [1: 2]", "friend.example\na b"),
        ] {
            let rig = Rig::new();
            rig.write("mesh", mesh);
            rig.write("trust-domains", list);
            let trust = rig.open();
            let known = trust.known.borrow();
            assert_eq!((known.aliases.len(), known.accepted.len()), (1, 0), "{mesh:?} {list:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_domain_counts_as_long_as_a_file_names_it() {
        let rig = Rig::new();
        let trust = rig.open();
        let stop = CancellationToken::new();
        let watching = tokio::spawn(Arc::clone(&trust).watch(stop.clone()));
        let becomes = async |domain: &str| {
            while !trust.accepts(&own(), domain) {
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        rig.write("trust-domains", "friend.example\n");
        becomes("friend.example").await;
        rig.write("trust-domains", "no trust domain\n");
        tokio::time::sleep(3 * POLL_INTERVAL).await;
        assert!(trust.accepts(&own(), "friend.example"), "the last valid list stays");
        fs::remove_file(rig.folder.path().join("trust-domains")).unwrap();
        tokio::time::sleep(3 * POLL_INTERVAL).await;
        assert!(trust.accepts(&own(), "friend.example"), "a list that is gone says nothing");

        let own = own();
        let gone = trust.until_not_accepted(&own, "friend.example");
        let mut changes = trust.subscribe();
        rig.write("trust-domains", "other.example\n");
        gone.await;
        changes.changed().await;
        rig.write("mesh", "trustDomainAliases: [older.example]\n");
        becomes("older.example").await;
        changes.changed().await;
        assert!(trust.accepts(&own, "other.example"), "each file is its own");
        stop.cancel();
        watching.await.unwrap();
    }
}

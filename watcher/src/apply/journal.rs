//! What was changed outside the kernel's maps, on disk, so that it can be undone after a crash.
//!
//! Written before the change: a record without its change does no harm, a change without its record
//! would stay for ever. A reboot empties its folder, as it undoes everything that the journal
//! records.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    model::pod::PodIdentity,
    observe::{cgroups::CgroupId, netns::NetnsId},
};

/// A prepared netns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsRecord {
    /// Its device and inode.
    pub id: NetnsId,
    /// The uid of the pod that it was prepared for.
    pub uid: String,
    /// Who that pod is: its source may not know any more after a restart. `None`: an earlier version
    /// recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodIdentity>,
    /// The sysctls' values before we set them, by path.
    pub sysctls_before: BTreeMap<String, String>,
    /// What a later version records, kept for it.
    #[serde(flatten)]
    unknown: Unknown,
}

impl NetnsRecord {
    /// A netns that is about to be prepared.
    #[must_use]
    pub(crate) fn new(
        id: NetnsId,
        uid: String,
        pod: Option<PodIdentity>,
        sysctls_before: BTreeMap<String, String>,
    ) -> Self {
        Self { id, uid, pod, sysctls_before, unknown: Unknown::new() }
    }
}

/// Fields that this version does not know.
type Unknown = BTreeMap<String, serde_json::Value>;

/// A version that is rolled back must read what the later one wrote, and the later one must find
/// its own fields again. So unknown fields are kept, and `version` grows only when a field changes
/// its meaning, which an earlier version must refuse.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    #[serde(default = "first_version")]
    version: u32,
    /// By cookie.
    #[serde(default)]
    netns: BTreeMap<u64, NetnsRecord>,
    /// Cgroups of tunnels that programs are attached to.
    #[serde(default)]
    tunnels: BTreeMap<CgroupId, PathBuf>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// What this code writes, and the latest that it reads.
const VERSION: u32 = 1;

/// Files without a version are of the first.
fn first_version() -> u32 {
    1
}

impl Default for Content {
    fn default() -> Self {
        Self { version: VERSION, netns: BTreeMap::new(), tunnels: BTreeMap::new(), unknown: Unknown::new() }
    }
}

/// The file and its content.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    content: Content,
}

impl Journal {
    /// Reads `records.json` in `dir`, the run directory of one node. A missing file is an empty
    /// journal.
    ///
    /// # Errors
    /// The file cannot be read or parsed.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join("records.json");
        let invalid =
            |text: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {text}", path.display()));
        let content: Content = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Content::default(),
            Err(error) => return Err(error),
        };
        if content.version > VERSION {
            let text = format!(
                "version {}, expected at most {VERSION}: a later watcher wrote it; run `watcher uninstall` of that version",
                content.version
            );
            return Err(invalid(text));
        }
        Ok(Self { path, content })
    }

    /// Prepared netns, by cookie.
    #[must_use]
    pub fn netns(&self) -> &BTreeMap<u64, NetnsRecord> {
        &self.content.netns
    }

    /// The directory of the file.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// Cgroups of tunnels that programs are attached to.
    #[must_use]
    pub fn tunnels(&self) -> &BTreeMap<CgroupId, PathBuf> {
        &self.content.tunnels
    }

    /// Records netns, all in one write. The first record of each stays, since by the second one the
    /// sysctls' values are ours; only who the pod is may be added.
    ///
    /// # Errors
    /// The file cannot be written; then nothing is recorded.
    pub fn add_netns(&mut self, records: impl IntoIterator<Item = (u64, NetnsRecord)>) -> io::Result<()> {
        let before = self.content.netns.clone();
        for (cookie, record) in records {
            match self.content.netns.entry(cookie) {
                Entry::Vacant(entry) => drop(entry.insert(record)),
                // An earlier build may have set fewer sysctls. Of those that it set, the value from
                // before is what it recorded.
                Entry::Occupied(mut entry) => {
                    for (path, value) in record.sysctls_before {
                        entry.get_mut().sysctls_before.entry(path).or_insert(value);
                    }
                    if record.pod.is_some() {
                        entry.get_mut().pod = record.pod;
                    }
                }
            }
        }
        if self.content.netns == before {
            return Ok(());
        }
        self.save().inspect_err(|_| self.content.netns = before)
    }

    /// Removes netns, all in one write.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn remove_netns(&mut self, cookies: impl IntoIterator<Item = u64>) -> io::Result<()> {
        let before = self.content.netns.len();
        for cookie in cookies {
            self.content.netns.remove(&cookie);
        }
        if self.content.netns.len() == before { Ok(()) } else { self.save() }
    }

    /// Records that programs are attached to the cgroup of a tunnel.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add_tunnel(&mut self, id: CgroupId, dir: &Path) -> io::Result<()> {
        if self.content.tunnels.insert(id, dir.to_owned()).as_deref() == Some(dir) {
            return Ok(());
        }
        self.save()
    }

    /// Removes the cgroup of a tunnel.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn remove_tunnel(&mut self, id: CgroupId) -> io::Result<()> {
        if self.content.tunnels.remove(&id).is_some() { self.save() } else { Ok(()) }
    }

    /// Whole or not at all: a crash in the middle leaves the old file.
    fn save(&self) -> io::Result<()> {
        if self.content.netns.is_empty() && self.content.tunnels.is_empty() {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let next = self.path.with_extension("next");
        fs::write(&next, serde_json::to_vec(&self.content)?)?;
        fs::rename(next, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(before: &str) -> NetnsRecord {
        let sysctls = BTreeMap::from([("/proc/sys/x".to_owned(), before.to_owned())]);
        NetnsRecord::new(NetnsId { dev: 4, inode: 9 }, "u".to_owned(), None, sysctls)
    }

    #[test]
    fn a_journal_outlives_the_process_and_the_first_record_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.add_netns([(7, record("0"))]).unwrap();
        let mut more = record("1");
        more.sysctls_before.insert("/proc/sys/y".to_owned(), "2".to_owned());
        let pod = PodIdentity { name: "p".to_owned(), ..PodIdentity::default() };
        more.pod = Some(pod.clone());
        journal.add_netns([(7, more)]).unwrap();
        journal.add_netns([(7, record("1"))]).unwrap();
        journal.add_tunnel(5, Path::new("/c")).unwrap();
        let mut again = Journal::open(dir.path()).unwrap();
        let before = |path| again.netns()[&7].sysctls_before[path].clone();
        assert_eq!(before("/proc/sys/x"), "0");
        assert_eq!(before("/proc/sys/y"), "2", "an earlier build did not set it");
        assert_eq!(again.netns()[&7].pod, Some(pod), "what is known of it stays");
        assert_eq!(again.tunnels()[&5], Path::new("/c"));
        again.remove_netns([7]).unwrap();
        again.remove_tunnel(5).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "an empty journal leaves no file");
    }

    #[test]
    fn what_could_not_be_written_is_not_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("gone");
        fs::create_dir(&folder).unwrap();
        let mut journal = Journal::open(&folder).unwrap();
        fs::remove_dir(&folder).unwrap();
        for _ in 0..2 {
            journal.add_netns([(7, record("0"))]).unwrap_err();
            assert!(journal.netns().is_empty());
        }
        fs::create_dir(&folder).unwrap();
        journal.add_netns([(7, record("0"))]).unwrap();
        assert_eq!(Journal::open(&folder).unwrap().netns().len(), 1);
    }

    #[test]
    fn what_a_later_version_records_is_kept_and_another_meaning_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("records.json");
        let later = r#"{"version": 1, "netns": {"7": {"id": {"dev": 4, "inode": 9}, "uid": "u",
            "sysctls_before": {}, "routes": ["x"]}}, "tunnels": {}, "qdiscs": {"7": 1}}"#;
        fs::write(&file, later).unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.add_netns([(8, record("0"))]).unwrap();
        let written: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(written["netns"]["7"]["routes"][0], "x");
        assert_eq!(written["qdiscs"]["7"], 1);
        assert_eq!(Journal::open(dir.path()).unwrap().netns().len(), 2);
        // As the versions without a number wrote it.
        fs::write(&file, r#"{"netns": {}, "tunnels": {"5": "/c"}}"#).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().tunnels()[&5], Path::new("/c"));
        fs::write(&file, r#"{"version": 2, "netns": {}, "tunnels": {}}"#).unwrap();
        let error = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("expected at most 1"), "{error}");
    }

    #[test]
    fn a_broken_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("records.json"), "{").unwrap();
        assert!(Journal::open(dir.path()).unwrap_err().to_string().contains("records.json"));
    }
}

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

use crate::observe::{cgroups::CgroupId, netns::NetnsId};

/// A prepared netns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetnsRecord {
    /// Its device and inode.
    pub id: NetnsId,
    /// The uid of the pod that it was prepared for.
    pub uid: String,
    /// The sysctls' values before we set them, by path.
    pub sysctls_before: BTreeMap<String, String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// By cookie.
    netns: BTreeMap<u64, NetnsRecord>,
    /// Cgroups of tunnels that programs are attached to.
    tunnels: BTreeMap<CgroupId, PathBuf>,
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
        let content = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Content::default(),
            Err(error) => return Err(error),
        };
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
    /// sysctls' values are ours.
    ///
    /// # Errors
    /// The file cannot be written; then nothing is recorded.
    pub fn add_netns(&mut self, records: impl IntoIterator<Item = (u64, NetnsRecord)>) -> io::Result<()> {
        let mut new = Vec::new();
        for (cookie, record) in records {
            if let Entry::Vacant(entry) = self.content.netns.entry(cookie) {
                entry.insert(record);
                new.push(cookie);
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        self.save().inspect_err(|_| {
            for cookie in new {
                self.content.netns.remove(&cookie);
            }
        })
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
        NetnsRecord {
            id: NetnsId { dev: 4, inode: 9 },
            uid: "u".to_owned(),
            sysctls_before: BTreeMap::from([("/proc/sys/x".to_owned(), before.to_owned())]),
        }
    }

    #[test]
    fn a_journal_outlives_the_process_and_the_first_record_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.add_netns([(7, record("0"))]).unwrap();
        journal.add_netns([(7, record("1"))]).unwrap();
        journal.add_tunnel(5, Path::new("/c")).unwrap();
        let mut again = Journal::open(dir.path()).unwrap();
        assert_eq!(again.netns()[&7].sysctls_before["/proc/sys/x"], "0");
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
    fn a_broken_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("records.json"), "{").unwrap();
        assert!(Journal::open(dir.path()).unwrap_err().to_string().contains("records.json"));
    }
}

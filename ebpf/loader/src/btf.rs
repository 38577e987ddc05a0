//! Where the running kernel's structures have their members (BTF, `Documentation/bpf/btf.rst`).

use std::fs;

/// The kernel's description of its own types.
#[derive(Debug)]
struct Btf {
    data: Vec<u8>,
    types: (usize, usize),
    strings: usize,
}

const STRUCT: u32 = 4;

/// Where the kernel has its own.
pub(crate) const PATH: &str = "/sys/kernel/btf/vmlinux";

/// Why it is not known where the kernel has a member.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BtfError {
    #[error("cannot read {PATH}: {0}")]
    Read(std::io::Error),
    #[error("{PATH} is not type information that can be read")]
    Format,
    #[error("{PATH} has no {member} of struct {structure}, or a kind of type that is not known before it")]
    Missing { structure: &'static str, member: &'static str },
}

/// What the lifecycle programs need to close a cgroup as it is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CgroupOffsets {
    /// Of `kn` in `struct cgroup`.
    pub(crate) kn: u32,
    /// Of `id` in `struct kernfs_node`.
    pub(crate) id: u32,
    /// Of `name` there.
    pub(crate) name: u32,
}

impl CgroupOffsets {
    /// Of the running kernel.
    ///
    /// # Errors
    /// It does not tell, or not in a way that this version understands.
    pub(crate) fn of_kernel() -> Result<Self, BtfError> {
        Self::of(fs::read(PATH).map_err(BtfError::Read)?)
    }

    fn of(data: Vec<u8>) -> Result<Self, BtfError> {
        let btf = Btf::parse(data).ok_or(BtfError::Format)?;
        let offset =
            |structure, member| btf.offset(structure, member).ok_or(BtfError::Missing { structure, member });
        Ok(Self {
            kn: offset("cgroup", "kn")?,
            id: offset("kernfs_node", "id")?,
            name: offset("kernfs_node", "name")?,
        })
    }
}

impl Btf {
    fn parse(data: Vec<u8>) -> Option<Self> {
        const MAGIC: u32 = 0xeb9f;
        let at = |offset| number(&data, offset);
        let header = at(4)? as usize;
        if at(0)? & 0xffff != MAGIC {
            return None;
        }
        let (start, length) = (header + at(8)? as usize, at(12)? as usize);
        let strings = header + at(16)? as usize;
        Some(Self { types: (start, start + length), strings, data })
    }

    /// The offset in bytes of `member` in `struct structure`.
    fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let mut at = self.types.0;
        while at < self.types.1 {
            let (name, info) = (number(&self.data, at)?, number(&self.data, at + 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            if kind == STRUCT && self.is_called(name, structure) {
                let bitfields = info >> 31 == 1;
                return (0..count).map(|i| at + 12 + i * 12).find_map(|at| {
                    let bits = number(&self.data, at + 8)?;
                    let bits = if bitfields { bits & 0x00ff_ffff } else { bits };
                    self.is_called(number(&self.data, at)?, member).then_some(bits / 8)
                });
            }
            at += 12
                + match kind {
                    // integers, variables, declaration tags
                    1 | 14 | 17 => 4,
                    // arrays
                    3 => 12,
                    // structs, unions, sections, wide enums
                    STRUCT | 5 | 15 | 19 => count * 12,
                    // enums, prototypes
                    6 | 13 => count * 8,
                    // everything else is what all have in common; what is unknown ends the search
                    2 | 7..=12 | 16 | 18 => 0,
                    _ => return None,
                };
        }
        None
    }

    fn is_called(&self, name: u32, wanted: &str) -> bool {
        let from = self.strings + name as usize;
        let found = self.data.get(from..from + wanted.len() + 1);
        found.is_some_and(|found| &found[..wanted.len()] == wanted.as_bytes() && found[wanted.len()] == 0)
    }
}

fn number(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_and_nonsense_is_none() {
        assert!(Btf::parse(Vec::new()).is_none());
        assert!(Btf::parse(vec![0; 64]).is_none());
        let mut data = Vec::new();
        for word in [0x0001_eb9f_u32, 24, 0, 12 + 4 + 12 + 12, 40, 16] {
            data.extend(word.to_ne_bytes());
        }
        // int; struct "s" { member "m" at bit 64 }
        for word in [0, 1 << 24, 4, 0, 1, STRUCT << 24 | 1, 16, 3, 1, 64] {
            data.extend(u32::to_ne_bytes(word));
        }
        data.extend(b"\0s\0m\0");
        let btf = Btf::parse(data).unwrap();
        assert_eq!(btf.offset("s", "m"), Some(8));
        assert_eq!((btf.offset("s", "n"), btf.offset("t", "m")), (None, None));
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut data = Vec::new();
        // A kind that does not exist yet, before all that is looked for.
        for word in [0x0001_eb9f_u32, 24, 0, 12, 12, 1, 0, 31 << 24, 0] {
            data.extend(word.to_ne_bytes());
        }
        data.push(0);
        let error = CgroupOffsets::of(data).unwrap_err().to_string();
        assert!(error.contains("no kn of struct cgroup"), "{error}");
        let error = CgroupOffsets::of(vec![1; 64]).unwrap_err().to_string();
        assert!(error.contains("not type information"), "{error}");
        let offsets = CgroupOffsets::of_kernel().unwrap();
        assert!(offsets.kn != 0 && offsets.id != offsets.name, "{offsets:?}");
    }
}

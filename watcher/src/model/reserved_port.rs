//! Ports of the tunnel in a pod's netns, and applications of the pod that use them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An application of a pod that uses a port which is the tunnel's there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservedPortUse {
    /// Which port.
    pub port: u16,
    /// Whether it is of UDP.
    pub is_udp: bool,
    /// Whether it listens; else it tried to have the port, and the tunnel has it.
    pub listens: bool,
    /// What the process is called that was first seen to, as far as that is known.
    pub process: Option<String>,
    /// Its number, as the watcher sees it.
    pub pid: Option<i32>,
}

impl ReservedPortUse {
    /// Whether both are of the same port, in the same way.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        (self.port, self.is_udp, self.listens) == (other.port, other.is_udp, other.listens)
    }

    /// Without the number of the process, which changes from one attempt to the next.
    #[must_use]
    pub fn describe(&self) -> String {
        let process = match &self.process {
            Some(name) => format!("\"{name}\""),
            None => "an application".to_owned(),
        };
        let verb = if self.listens { "listens on" } else { "tried to bind" };
        let protocol = if self.is_udp { "UDP" } else { "TCP" };
        format!("{process} {verb} {protocol} port {}", self.port)
    }
}

impl fmt::Display for ReservedPortUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())?;
        self.pid.map_or(Ok(()), |pid| write!(f, " (process {pid})"))
    }
}

/// A name that a process gave itself, fit to be printed.
#[must_use]
pub fn process_name(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let name: String = String::from_utf8_lossy(&bytes[..end]).trim().escape_debug().collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_is_named_as_far_as_it_is_known() {
        let mut using = ReservedPortUse {
            port: 15006,
            is_udp: false,
            listens: true,
            process: process_name(b"nginx\0\0\0"),
            pid: Some(7),
        };
        assert_eq!(using.to_string(), "\"nginx\" listens on TCP port 15006 (process 7)");
        using = ReservedPortUse { process: None, pid: None, listens: false, is_udp: true, ..using };
        assert_eq!(using.to_string(), "an application tried to bind UDP port 15006");
        assert_eq!(process_name(b"a\x1b[2J\n\0"), Some("a\\u{1b}[2J".to_owned()));
        assert_eq!((process_name(b"\0\0"), process_name(b"")), (None, None));
    }
}

//! Every program by trial load, which tries its type, its helpers and its maps. They go when the
//! check ends.

use std::error::Error;

use aya::{EbpfLoader, programs::Program};
use error_reporter::Report;

use super::Check;
use crate::{
    lifecycle,
    object::{self, INGRESS, NETNS, PODS, TUNNEL},
};

/// A type of program, what it is for, and what the kernel needs to have it.
struct Kind {
    name: &'static str,
    needed: &'static str,
    advice: &'static str,
    is_it: fn(&Program) -> bool,
}

const CGROUP_BPF: &str = "run with the capabilities above; a kernel needs CONFIG_CGROUP_BPF, and the helper that the verifier names";
const NET: &str = "run with the capabilities above; a kernel needs CONFIG_BPF_STREAM_PARSER, and the helper that the verifier names";

const KINDS: [Kind; 6] = [
    Kind {
        name: "cgroup/sock_addr",
        needed: "programs of connect, bind, sendmsg, recvmsg and getpeername",
        advice: CGROUP_BPF,
        is_it: |program| matches!(program, Program::CgroupSockAddr(_)),
    },
    Kind {
        name: "cgroup/sockopt",
        needed: "a program that answers SO_ORIGINAL_DST",
        advice: CGROUP_BPF,
        is_it: |program| matches!(program, Program::CgroupSockopt(_)),
    },
    Kind {
        name: "cgroup/sock",
        needed: "a program that notes the netns of the tunnel's sockets",
        advice: CGROUP_BPF,
        is_it: |program| matches!(program, Program::CgroupSock(_)),
    },
    Kind {
        name: "cgroup/skb",
        needed: "a program that drops what arrives for new pods",
        advice: CGROUP_BPF,
        is_it: |program| matches!(program, Program::CgroupSkb(_)),
    },
    Kind {
        name: "sock_ops",
        needed: "programs that follow TCP connections",
        advice: NET,
        is_it: |program| matches!(program, Program::SockOps(_)),
    },
    Kind {
        name: "sk_lookup",
        needed: "a program that steers arrivals (Linux 5.9)",
        advice: NET,
        is_it: |program| matches!(program, Program::SkLookup(_)),
    },
];

pub(super) fn load_each() -> Vec<Check> {
    let mut object = match EbpfLoader::new().load(object::BYTES) {
        Ok(object) => object,
        Err(error) => {
            let advice = "run with the capabilities above; a kernel needs CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER";
            return vec![Check::fail("maps", "a kernel that makes every map", reason(&error), advice)];
        }
    };
    let mut checks =
        vec![Check::ok("maps", "a kernel that makes every map", format!("{} made", object.maps().count()))];
    let mut names: Vec<_> =
        PODS.iter().chain(&TUNNEL).chain([&INGRESS, &NETNS]).map(|place| place.program).collect();
    names.sort_unstable();
    names.dedup();
    for Kind { name, needed, advice, is_it } in KINDS {
        let (mut accepted, mut refused) = (0, None);
        for program in &names {
            let Some(loaded) = object.program_mut(program).filter(|program| is_it(program)) else { continue };
            match object::load(loaded) {
                Ok(()) => accepted += 1,
                Err(error) => {
                    refused = refused.or_else(|| Some(format!("{program} refused: {}", reason(&error))));
                }
            }
        }
        checks.push(match refused {
            None => Check::ok(name, needed, format!("{accepted} accepted")),
            Some(found) => Check::fail(name, needed, found, advice),
        });
    }
    let (name, needed) = ("raw_tracepoint", "programs that tell of cgroups and processes");
    checks.push(match lifecycle::try_load(&mut object) {
        Ok(count) => Check::ok(name, needed, format!("{count} accepted")),
        Err((program, error)) => Check::warn(
            name,
            needed,
            format!("{program} refused: {}", reason(&error)),
            "run with CAP_PERFMON or CAP_SYS_ADMIN; without, pods are found by the process connector or by inotify, a moment later",
        ),
    });
    checks
}

/// An error with its causes in one line; of what the verifier wrote, the line that says what it
/// minded.
fn reason(error: &(dyn Error + 'static)) -> String {
    let text = Report::new(error).to_string();
    let first = text.lines().next().unwrap_or_default();
    let first = first.split(". Verifier output:").next().unwrap_or_default();
    // It ends with statistics; what stands before them is why it stopped.
    let minded = text
        .lines()
        .skip(1)
        .map(str::trim)
        .filter(|line| {
            !line.is_empty() && !line.starts_with("processed ") && !line.starts_with("verification time")
        })
        .last();
    match minded {
        Some(minded) => format!("{first} ({minded})"),
        None => first.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error(
        "the kernel refuses it. Verifier output: func#0 @0\n0: (85) call bpf_x#250\nunknown func bpf_x#250\nprocessed 1 insns\n"
    )]
    struct Refused;

    #[test]
    fn what_the_verifier_minded_is_told_in_one_line() {
        assert_eq!(reason(&Refused), "the kernel refuses it (unknown func bpf_x#250)");
        assert_eq!(reason(&std::io::Error::other("plain")), "plain");
    }
}

//! Whether pods of this node have rules that Istio's node agent left.

use adit_ebpf_loader::preflight::Check;

use crate::{
    apply::istio_rules::can_be_taken_out,
    observe::netns::{run_in, visit_all},
};

/// Looks into every netns of the node.
#[must_use]
pub fn istio_rules() -> Check {
    let (mut removable, mut legacy) = (0, 0);
    let visited = visit_all(|_, netns| match run_in(netns, can_be_taken_out) {
        Ok(Some(true)) => removable += 1,
        Ok(Some(false)) => legacy += 1,
        // It may have gone meanwhile.
        Ok(None) | Err(_) => {}
    });
    check(visited.map(|()| (removable, legacy)).map_err(|error| error.to_string()))
}

/// `found`: how many netns have rules that can be taken out, and how many others.
fn check(found: Result<(usize, usize), String>) -> Check {
    let (name, needed) = (
        "istio rules",
        "pods without redirect rules of Istio's node agent, or with such that can be taken out",
    );
    match found {
        Ok((0, 0)) => Check::ok(name, needed, "none"),
        Ok((removable, 0)) => {
            let found = format!("in {removable} netns; taken out when their pods are enrolled");
            Check::ok(name, needed, found)
        }
        Ok((_, legacy)) => {
            let found = format!("in {legacy} netns, of legacy iptables");
            Check::warn(name, needed, found, "restart these pods when Istio's agent has gone")
        }
        Err(error) => Check::warn(name, needed, error, "give the watcher more file descriptors"),
    }
}

#[cfg(test)]
mod tests {
    use adit_ebpf_loader::preflight::Level;

    use super::*;

    #[test]
    fn only_rules_that_cannot_be_taken_out_are_warned_of() {
        for (found, level, said) in [
            (Ok((0, 0)), Level::Ok, "none"),
            (Ok((3, 0)), Level::Ok, "in 3 netns; taken out"),
            (Ok((3, 2)), Level::Warn, "in 2 netns, of legacy iptables"),
            (Err("no descriptors".to_owned()), Level::Warn, "no descriptors"),
        ] {
            let check = check(found);
            assert_eq!(check.level, level, "{check:?}");
            assert!(check.found.starts_with(said), "{check:?}");
        }
    }
}

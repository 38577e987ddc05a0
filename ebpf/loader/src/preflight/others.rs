//! Programs that are not ours where ours will be attached.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
};

use aya::programs::loaded_programs;
use aya_obj::generated::bpf_attach_type::{self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT};

use super::Check;
use crate::{links, object::PODS, sys};

const CONNECT: [bpf_attach_type; 2] = [BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT];
/// Looked at below the pods' cgroup; a node with more of them has its answer by then.
const MOST_CGROUPS: usize = 4096;

/// A program attached alone, at the pods' cgroup or above, forbids ours.
pub(super) fn nobody_in_the_way(cgroup: &Path) -> Check {
    let (name, needed) =
        ("other programs", "no program attached without BPF_F_ALLOW_MULTI at the pods' cgroup or above");
    if let Err(error) = File::open(cgroup) {
        let found = format!("{}: {error}", cgroup.display());
        return Check::fail(name, needed, found, "name the cgroup that the pods are below (--attach)");
    }
    match PODS.iter().find_map(|place| links::culprit(cgroup, place.attach_type)) {
        None => Check::ok(name, needed, "none"),
        Some(culprit) => {
            Check::fail(name, needed, culprit, "detach it, or have its owner attach it by a link")
        }
    }
}

/// Others' connect programs, such as load balancers of sockets. The kernel runs those of a cgroup
/// before those of its ancestors, and of one cgroup in the order of attachment. Above ours they see
/// what we left of a connection; at the same cgroup or below they may have rewritten a service's
/// address before we see it.
pub(super) fn balancers(root: &Path, cgroup: &Path) -> Check {
    let (name, needed) = (
        "socket load balancer",
        "connect programs of others only above the pods' cgroup, where ours run first",
    );
    let names: BTreeMap<u32, String> = loaded_programs()
        .filter_map(Result::ok)
        .map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned()))
        .collect();
    let at = |dir: &Path| -> Vec<String> {
        let Ok(opened) = File::open(dir) else { return Vec::new() };
        let attached = CONNECT.iter().filter_map(|kind| sys::attached(&opened, *kind).ok());
        let ids = attached.flat_map(|(ids, _)| ids);
        ids.map(|id| (id, names.get(&id).map_or("", String::as_str)))
            .filter(|(_, name)| !name.starts_with("adit_"))
            .map(|(id, name)| format!("program {id} ({name}) at {}", dir.display()))
            .collect()
    };
    let before: Vec<String> = below(cgroup).iter().flat_map(|dir| at(dir)).collect();
    if let Some(first) = before.first() {
        let more = if before.len() > 1 { format!(" and {} more", before.len() - 1) } else { String::new() };
        let advice = "have it attached above the pods' cgroup, or switch its socket load balancing off: it may hide services' addresses from the mesh";
        return Check::warn(name, needed, format!("{first}{more}"), advice);
    }
    let above: Vec<String> =
        cgroup.ancestors().skip(1).take_while(|dir| dir.starts_with(root)).flat_map(at).collect();
    if above.is_empty() {
        Check::ok(name, needed, "none")
    } else {
        Check::ok(name, needed, format!("{}, which runs after ours", above.join(", ")))
    }
}

/// `cgroup` and those below it.
fn below(cgroup: &Path) -> Vec<std::path::PathBuf> {
    let mut found = vec![cgroup.to_owned()];
    let mut next = 0;
    while next < found.len() && found.len() < MOST_CGROUPS {
        let entries = fs::read_dir(&found[next]).into_iter().flatten().filter_map(Result::ok);
        found.extend(
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
        next += 1;
    }
    found
}

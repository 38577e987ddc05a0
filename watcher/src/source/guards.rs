//! How a list of guards is written: profiles by name, users, groups and containers.

use serde_json::Value;

use super::profiles::PROFILES;
use crate::model::{exclusions, guards::GuardList, notes::Notes};

/// What an item may be, for messages and the documentation.
pub(crate) const EXPECTED: &str = "profiles, uid:NUMBER, gid:NUMBER, container:NAME, or none";
/// How many users and groups a list may name: each takes an entry of a map.
const MAX_IDS: usize = 64;
/// How many containers.
const MAX_CONTAINERS: usize = 32;

/// Reads guards (`istio`, `"istio, uid:5000"`); invalid items go to `notes`, named by `key`.
pub(crate) fn read(key: &str, value: &Value, notes: &mut Notes) -> GuardList {
    let mut list = GuardList::default();
    let items = exclusions::read(key, value, EXPECTED, notes, |item| {
        Some(item).filter(|_| is_valid(item)).map(str::to_owned)
    });
    for item in items {
        if item == "none" {
            list.alone = true;
        } else if let Some(profile) = PROFILES.get(&item) {
            list.guards.users.extend(&profile.users);
            list.guards.groups.extend(&profile.groups);
        } else if let Some(Ok(id)) = item.strip_prefix("uid:").map(str::parse) {
            list.guards.users.insert(id);
        } else if let Some(Ok(id)) = item.strip_prefix("gid:").map(str::parse) {
            list.guards.groups.insert(id);
        } else if let Some(name) = item.strip_prefix("container:") {
            list.guards.containers.insert(name.to_owned());
        }
    }
    let guards = &mut list.guards;
    let is_over =
        guards.users.len() + guards.groups.len() > MAX_IDS || guards.containers.len() > MAX_CONTAINERS;
    if is_over {
        notes.push(format!(
            "{key}: ignored, it names more than {MAX_IDS} users and groups, or {MAX_CONTAINERS} containers"
        ));
        list.guards = crate::model::guards::Guards::default();
    }
    list
}

fn is_valid(item: &str) -> bool {
    let is_number = |text: &str| text.parse::<u32>().is_ok_and(|id| id != u32::MAX);
    let is_name = |text: &str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=96).contains(&text.len()) && text.bytes().all(fits) && !text.starts_with('.')
    };
    match item.split_once(':') {
        None => item == "none" || PROFILES.contains_key(item),
        Some(("uid" | "gid", number)) => is_number(number),
        Some(("container", name)) => is_name(name),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn guards_are_read_and_nonsense_is_noted() {
        let mut notes = Notes::default();
        let list = read("guards", &json!("istio, linkerd,uid:5000,gid:7, container:my-proxy"), &mut notes);
        assert_eq!(list.guards.users.into_iter().collect::<Vec<_>>(), [1337, 2102, 5000]);
        assert_eq!(list.guards.groups.into_iter().collect::<Vec<_>>(), [7, 1337]);
        assert_eq!(list.guards.containers.into_iter().collect::<Vec<_>>(), ["my-proxy"]);
        assert!(!list.alone && notes.is_empty(), "{notes:?}");
        assert!(read("guards", &json!(["none", "kuma"]), &mut notes).alone && notes.is_empty());
        for bad in [
            "consul",
            "uid:",
            "uid:-1",
            "uid:4294967295",
            "uid:4294967296",
            "gid:x",
            "container:",
            "container:../x",
            "user:1",
        ] {
            let mut notes = Notes::default();
            assert_eq!(read("guards", &json!(bad), &mut notes), GuardList::default(), "{bad}");
            assert!(notes[0].contains(EXPECTED), "{notes:?}");
        }
        let many: Vec<String> = (1..=65).map(|id| format!("uid:{id}")).collect();
        assert!(
            read("guards", &json!(many), &mut notes).guards.is_empty() && notes[0].contains("more than 64"),
            "{notes:?}"
        );
    }
}

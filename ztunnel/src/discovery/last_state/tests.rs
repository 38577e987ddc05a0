use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    io::Cursor,
    os::unix::fs::{PermissionsExt, chown},
    time::{Duration, Instant, UNIX_EPOCH},
};

use proptest::prelude::*;
use prost::Message as _;
use prost_types::Any;

use super::{
    record::{Content, FORMAT, MAGIC, Record, Removed},
    *,
};
use crate::discovery::{ADDRESS, AUTHORIZATION};

fn origin() -> Origin {
    Origin { cluster: "Kubernetes".to_owned(), trust_domain: "cluster.local".to_owned(), ..Origin::default() }
}

fn resource(name: &str, value: &[u8]) -> Resource {
    let value = Any { type_url: String::new(), value: value.to_vec() };
    Resource { name: name.to_owned(), resource: Some(value), ..Resource::default() }
}

/// Type and name of each resource, and its content.
type Resources = BTreeMap<(String, String), Vec<u8>>;

fn resources<R: io::Read + io::Seek>(state: &mut KeptState<R>) -> Resources {
    let mut all = Resources::new();
    let replayed = state.replay(|piece| {
        let Piece::Response(response) = piece else { return };
        for name in response.removed_resources {
            all.remove(&(response.type_url.clone(), name));
        }
        for resource in response.resources {
            let value = resource.resource.expect("content").value;
            all.insert((response.type_url.clone(), resource.name), value);
        }
    });
    replayed.expect("it was read before");
    all
}

fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < end, "no {what} within 20 s");
        thread::yield_now();
    }
}

fn started(folder: &Path) -> LastState {
    LastState::start(folder, origin()).unwrap()
}

fn found(by: &LastState, count: usize) -> Resources {
    wait_for("state of that size", || {
        let resources = resources(&mut by.find()?.state);
        (resources.len() == count).then_some(resources)
    })
}

fn key(type_url: &str, name: &str) -> (String, String) {
    (type_url.to_owned(), name.to_owned())
}

#[test]
fn a_successor_knows_what_its_predecessor_is_told_while_both_live() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xds");
    let (before, after) = (started(&path), started(&path));
    before.told(ADDRESS, vec![], vec![resource("a", b"1")], vec![]);
    wait_for("file", || (fs::read_dir(&path).is_ok_and(|mut files| files.next().is_some())).then_some(()));
    assert!(after.find().is_none(), "policies were not told yet");
    before.told(AUTHORIZATION, vec![], vec![resource("deny", b"x")], vec![]);
    assert_eq!(found(&after, 2)[&key(AUTHORIZATION, "deny")], b"x");
    before.told(ADDRESS, vec!["a".to_owned()], vec![resource("b", b"2"), resource("c", b"3")], vec![]);
    let all = found(&after, 3);
    assert_eq!(all.get(&key(ADDRESS, "a")), None);

    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&after.find().unwrap().path), 0o600);
    assert!(before.status().view().kept_bytes > 0);

    // When the predecessor is gone and its successor was told, only the latter's file is left.
    drop(before);
    after.told(AUTHORIZATION, vec![], vec![], vec![]);
    after.told(ADDRESS, vec![], vec![], vec![]);
    wait_for("predecessor's file to go", || (fs::read_dir(&path).unwrap().count() == 1).then_some(()));
    assert_eq!(found(&after, 0), Resources::new());
}

#[test]
fn the_state_of_another_mesh_or_node_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let ours = started(folder.path());
    for type_url in [ADDRESS, AUTHORIZATION] {
        ours.told(type_url, vec![], vec![], vec![]);
    }
    found(&ours, 0);
    let others = [
        ("node.cluster", Origin { cluster: "other".to_owned(), ..origin() }),
        ("node.network", Origin { network: "other".to_owned(), ..origin() }),
        ("node.trust_domain", Origin { trust_domain: "other".to_owned(), ..origin() }),
        ("node.name", Origin { node: "other".to_owned(), ..origin() }),
        ("xds.on_demand", Origin { on_demand: true, ..origin() }),
    ];
    let path = ours.find().unwrap().path;
    for (key, other) in others {
        let error = KeptState::open(File::open(&path).unwrap(), &other).unwrap_err().to_string();
        assert!(error.starts_with(&format!("it was told to a tunnel with {key} ")), "{error}");
        assert!(LastState::start(folder.path(), other).unwrap().find().is_none());
    }
    // Of another format, and no state at all.
    let open = |bytes: &[u8]| KeptState::open(Cursor::new(bytes), &origin()).unwrap_err().to_string();
    let old = [&MAGIC[..], &(FORMAT - 1).to_le_bytes()].concat();
    assert_eq!(open(&old), "it has format 0, and this tunnel reads format 1 alone");
    for other in [&b""[..], b"adit", b"workloads: []\n"] {
        assert_eq!(open(other), "it is not a state that a tunnel has kept");
    }
    assert_eq!(open(&preamble()), "it ends before the control plane had told every kind of resource");
}

#[test]
fn a_folder_that_others_can_write_is_neither_read_nor_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut path = folder.path().to_owned();
    if chown(&path, Some(1), None).is_err() {
        // Nor can others, such as we here, write to root's.
        path = "/usr".into();
    }
    let state = started(&path);
    let error = wait_for("refusal", || state.status().view().error);
    assert!(error.contains("must belong to user") && error.contains(&path.display().to_string()), "{error}");
    assert!(state.find().is_none());

    // Its own it makes private.
    let own = tempfile::tempdir().unwrap();
    fs::set_permissions(own.path(), Permissions::from_mode(0o777)).unwrap();
    let state = started(own.path());
    for type_url in [ADDRESS, AUTHORIZATION] {
        state.told(type_url, vec![], vec![], vec![]);
    }
    found(&state, 0);
    assert_eq!(fs::metadata(own.path()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_file_is_rewritten_without_what_is_past_and_policies_come_first() {
    let folder = tempfile::tempdir().unwrap();
    let state = started(folder.path());
    let large = vec![7; 100_000];
    state.told(ADDRESS, vec![], vec![resource("stays", b"1"), resource("goes", b"2")], vec![]);
    state.told(AUTHORIZATION, vec![], vec![resource("deny", b"x")], vec![]);
    let first = wait_for("file", || state.find()).path;
    for _ in 0..40 {
        state.told(ADDRESS, vec!["goes".to_owned()], vec![resource("large", &large)], vec![]);
    }
    wait_for("another file", || state.find().filter(|found| found.path != first));
    // It may be rewritten again at any time.
    let size = || wait_for("its size", || fs::metadata(state.find()?.path).ok()).len();
    wait_for("all to be written", || (found(&state, 3).len() == 3).then_some(()));
    assert!(size() < 2_500_000, "{} bytes", size());
    assert!(!first.exists());
    // It goes on where the other ended.
    state.told(AUTHORIZATION, vec!["deny".to_owned()], vec![resource("other", b"y")], vec![]);
    state.told(ADDRESS, vec![], vec![resource("new", b"3")], vec![]);
    let all = found(&state, 4);
    assert_eq!(all[&key(AUTHORIZATION, "other")], b"y");
    assert!(!all.contains_key(&key(AUTHORIZATION, "deny")) && !all.contains_key(&key(ADDRESS, "goes")));
    let bytes = fs::read(state.find().unwrap().path).unwrap();
    let place = |name: &[u8]| bytes.windows(name.len()).position(|window| window == name);
    assert!(place(b"deny") < place(b"stays"), "policies first");
}

/// A response: whether of policies, the names that it removes, and what it puts.
type Told = (bool, Vec<u8>, Vec<(u8, Vec<u8>)>);

/// The file, and what is in force after each response: with the length of the file then.
fn written(history: &[Told]) -> (Vec<u8>, Vec<(usize, Resources)>) {
    let mut frames = FrameWriter::new(Vec::new(), &preamble()).unwrap();
    let mut write = |content| frames.write(&Record { content: Some(content) }.encode_to_vec()).unwrap();
    let (mut told, mut all, mut states) = ([false; 2], Resources::new(), Vec::new());
    let mut length = preamble().len() as u64 + write(Content::Origin(origin()));
    for (second, (policies, removed, put)) in history.iter().enumerate() {
        let type_url = if *policies { AUTHORIZATION } else { ADDRESS };
        let kind = Kind::of(type_url);
        for name in removed {
            all.remove(&key(type_url, &name.to_string()));
            length += write(Content::Removed(Removed { kind: kind.into(), name: name.to_string() }));
        }
        for (name, value) in put {
            all.insert(key(type_url, &name.to_string()), value.clone());
            length += write(Content::put(kind, resource(&name.to_string(), value)));
        }
        length += write(Content::told(kind, UNIX_EPOCH + Duration::from_secs(second as u64)));
        told[usize::from(*policies)] = true;
        if told == [true; 2] {
            states.push((usize::try_from(length).unwrap(), all.clone()));
        }
    }
    (frames.to, states)
}

fn read(bytes: &[u8]) -> Result<Resources, UnusableState> {
    KeptState::open(Cursor::new(bytes), &origin()).map(|mut state| resources(&mut state))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Cut anywhere, or with zeros where the end was not written, it is what was in force after the
    /// last response that is whole, and nothing while there is no such state.
    #[test]
    fn a_state_without_its_end_is_what_was_in_force_once(
        history in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(0_u8..4, 0..2),
             prop::collection::vec((0_u8..4, prop::collection::vec(any::<u8>(), 0..20)), 0..3)), 1..8),
        cut in any::<prop::sample::Index>(),
        zeros in 0_usize..100,
    ) {
        let (mut bytes, states) = written(&history);
        let whole = bytes.len();
        let cut = cut.index(whole + 1);
        bytes.truncate(cut);
        bytes.extend(std::iter::repeat_n(0, zeros));
        let expected = states.iter().rev().find(|(length, _)| *length <= cut).map(|(_, state)| state);
        let found = read(&bytes).ok();
        prop_assert_eq!(found.as_ref(), expected);
    }

    /// With a bit that changed it is not used at all: something was told that cannot be read.
    #[test]
    fn a_state_with_a_bit_that_changed_is_not_used(
        history in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(0_u8..4, 0..2),
             prop::collection::vec((0_u8..4, prop::collection::vec(any::<u8>(), 0..20)), 0..3)), 1..8),
        place in any::<prop::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let (mut bytes, _) = written(&history);
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read(&bytes).is_err());
        let behind = [&preamble()[..], &bytes].concat();
        prop_assert!(read(&behind).is_err());
    }
}

#[test]
fn a_record_that_is_gone_or_stands_elsewhere_is_noticed() {
    let put = |name: u8| vec![(name, vec![name; 20])];
    let (bytes, states) = written(&[
        (true, vec![], vec![]),
        (false, vec![], put(1)),
        (true, vec![], put(2)),
        (false, vec![], put(3)),
    ]);
    let [(_, _), (from, _), (to, _)] = &states[..] else { panic!("{states:?}") };
    let gone = [&bytes[..*from], &bytes[*to..]].concat();
    assert_eq!(read(&gone).unwrap().len(), 2, "it ends there");
    let (first, second, rest) = (&bytes[..states[0].0], &bytes[states[0].0..*from], &bytes[*from..]);
    for wrong in
        [[first, rest].concat(), [first, rest, second].concat(), [first, second, second, rest].concat()]
    {
        assert!(matches!(read(&wrong), Err(UnusableState::Broken { .. })));
    }
}

#[test]
fn a_disk_that_cannot_be_written_is_said_once_and_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, "").unwrap();
    let state = started(&path);
    let error = wait_for("failure", || state.status().view().error);
    assert!(error.contains(&path.display().to_string()), "{error}");
    for _ in 0..QUEUE * 2 {
        state.told(ADDRESS, vec![], vec![resource("a", &[0; 1000])], vec![]);
    }
    assert!(!state.begin_anew(), "it cannot be kept yet");
    assert_eq!(state.status().view().kept_bytes, 0);
}

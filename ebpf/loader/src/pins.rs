//! Which pinned maps are adopted, and what becomes of those of other versions.
//!
//! Links run the programs of the version before, with its maps, until they get new programs. So
//! nothing is lost with the pin of a map: what matters is that a map has its entries before a
//! program that reads it runs. Whether that is so is asked of the kernel: a map whose entries this
//! version adopts is one that the linked programs use. No file has to be believed, and it makes no
//! difference which version is the later one, or whether one was killed in the middle.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use adit_ebpf_common::maps::{Keeps, MapSpec};
use aya::{
    Ebpf,
    maps::MapInfo,
    programs::{Program, ProgramError, ProgramInfo, loaded_programs},
};
use aya_obj::{Map, Object};
use tracing::{info, warn};

use crate::{
    KernelError, links,
    maps::{pin, pinned},
    object::{self, PODS},
};

/// Makes the pins in `folder` fit: a map that only changed its name is renamed, one of another
/// type, layout or size is unpinned. Pins that this version does not know stay until
/// [`remove_unknown`].
///
/// # Errors
/// A pin cannot be listed, read, renamed or removed, or the map of the tunnel's sockets is another
/// version's.
pub(crate) fn adopt(folder: &Path) -> Result<(), KernelError> {
    let object = Object::parse(object::BYTES)
        .map_err(|error| KernelError::Object { source: Box::new(error.into()) })?;
    // Before anything is changed.
    check_sockets(folder, &object)?;
    for map in pinned() {
        let path = pin(folder, map);
        if let Some(formerly) = map.formerly {
            let old = folder.join(formerly);
            if old.exists() && !path.exists() {
                info!(map = map.name, formerly, "adopting a map by its earlier name");
                fs::rename(&old, &path).map_err(KernelError::pin("rename", old))?;
            }
        }
        if !path.exists() {
            continue;
        }
        let Some(wanted) = object.maps.get(map.name) else { continue };
        let info = MapInfo::from_pin(&path).map_err(KernelError::map("open pinned", map.name))?;
        if fits(map, &info, wanted) {
            continue;
        }
        warn!(path = %path.display(), "replacing a map of another layout or size");
        fs::remove_file(&path).map_err(KernelError::pin("unpin", path))?;
    }
    Ok(())
}

/// Whether the map of `info` is what `wanted` would make.
fn fits(map: &MapSpec, info: &MapInfo, wanted: &Map) -> bool {
    let kind = |info: &MapInfo| info.map_type().is_ok_and(|kind| kind as u32 == wanted.map_type());
    let layout = |info: &MapInfo| (info.key_size(), info.value_size());
    let same = kind(info) && layout(info) == (wanted.key_size(), wanted.value_size());
    let size = (info.max_entries(), info.map_flags()) == (wanted.max_entries(), wanted.map_flags());
    same && (size || map.keeps == Keeps::Sockets)
}

/// The listeners of a tunnel are in one map, whatever the version: nobody can copy them.
fn check_sockets(folder: &Path, object: &Object) -> Result<(), KernelError> {
    let of_sockets = pinned().filter(|map| map.keeps == Keeps::Sockets);
    for (map, wanted) in of_sockets.filter_map(|map| Some((map, object.maps.get(map.name)?))) {
        let (own, prefix) = (pin(folder, map), format!("{}-", map.name));
        let names = [Some(map.name), map.formerly];
        for path in list(folder)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_named = names.contains(&Some(&*name));
            let other_abi = name.strip_prefix(&prefix).is_some_and(|abi| abi.parse::<u32>().is_ok());
            let fits_not = || {
                let info = MapInfo::from_pin(&path).map_err(KernelError::map("open pinned", map.name));
                info.map(|info| !fits(map, &info, wanted))
            };
            if (other_abi && path != own) || (is_named && fits_not()?) {
                return Err(KernelError::OtherVersion { map: map.name, path });
            }
        }
    }
    Ok(())
}

/// Removes the pins in `folder` that this version does not know. To be called when no link runs a
/// program of another version any more.
///
/// # Errors
/// A pin cannot be listed or removed.
pub(crate) fn remove_unknown(folder: &Path) -> Result<(), KernelError> {
    let known: BTreeSet<PathBuf> = pinned().map(|map| pin(folder, map)).collect();
    for path in list(folder)?.into_iter().filter(|path| !known.contains(path)) {
        info!(path = %path.display(), "removing a map of another version");
        fs::remove_file(&path).map_err(KernelError::pin("unpin", path))?;
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let failed = KernelError::pin("list", folder);
    let entries = fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    entries.map_err(failed)
}

/// What is attached already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No program of the pods.
    Nothing,
    /// Programs that use the same maps of entries.
    OwnMaps,
    /// Programs of another version that use other maps of entries: ours must be filled before ours
    /// are attached.
    OtherMaps,
}

/// What links run, beside the programs of `object`, and with which maps.
///
/// # Errors
/// Links, programs or maps cannot be read.
pub(crate) fn found(object: &Ebpf, links: &Path, maps: &Path) -> Result<Found, KernelError> {
    let running = links::pods_programs(links)?;
    if running.is_empty() {
        return Ok(Found::Nothing);
    }
    let failed = |source| KernelError::Programs { source };
    let mut entries = BTreeSet::new();
    for map in pinned().filter(|map| map.keeps == Keeps::Entries) {
        let info = MapInfo::from_pin(pin(maps, map)).map_err(KernelError::map("open pinned", map.name))?;
        entries.insert(info.id());
    }
    let ids: BTreeSet<u32> = running.values().copied().collect();
    let used: Vec<(u32, BTreeSet<u32>)> = loaded_programs()
        // One that ends at this moment is not linked.
        .filter_map(Result::ok)
        .filter(|program| ids.contains(&program.id()))
        .map(|program| Ok((program.id(), maps_of(&program)?)))
        .collect::<Result<_, ProgramError>>()
        .map_err(|error| failed(io::Error::other(error)))?;
    let of_all: BTreeSet<u32> = used.iter().flat_map(|(_, maps)| maps).copied().collect();
    for attachment in PODS {
        let Some(own) = object.program(attachment.program).map(Program::info) else { continue };
        let own = own.and_then(|own| maps_of(&own)).map_err(|error| failed(io::Error::other(error)))?;
        let theirs = running.get(attachment.program).and_then(|id| used.iter().find(|(of, _)| of == id));
        // A program that the other version did not have may read what any of its programs read.
        let theirs = theirs.map_or(&of_all, |(_, maps)| maps);
        if own.iter().any(|map| entries.contains(map) && !theirs.contains(map)) {
            return Ok(Found::OtherMaps);
        }
    }
    Ok(Found::OwnMaps)
}

fn maps_of(program: &ProgramInfo) -> Result<BTreeSet<u32>, ProgramError> {
    Ok(program.map_ids()?.unwrap_or_default().into_iter().collect())
}

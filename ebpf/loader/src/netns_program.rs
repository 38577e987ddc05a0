//! The program that steers arrivals, one copy for each netns.
//!
//! A program of sk_lookup cannot ask in which netns it runs, in no kernel so far. So each netns
//! gets a copy that has its cookie as a constant. The object is parsed and linked to the maps once;
//! a copy then costs the verifier's time for one program, and no map.

use std::{
    collections::HashSet,
    ffi::CString,
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    thread,
};

use adit_ebpf_common::enrolment::NETNS_COOKIE_PLACEHOLDER;
use aya::{Ebpf, maps::Map};
use aya_obj::{Object, generated::bpf_insn};

use crate::{
    KernelError,
    object::{self, NETNS},
    sys,
};

/// The verifier takes some 2 ms for a copy, and checks several side by side.
const MOST_THREADS: usize = 4;

/// `BPF_LD | BPF_IMM | BPF_DW`: loads a number of 64 bits, which takes two instructions.
const LOAD_NUMBER: u8 = 0x18;

/// The linked program, with the placeholder where a cookie belongs.
#[derive(Debug)]
pub(crate) struct NetnsProgram {
    instructions: Vec<bpf_insn>,
    license: CString,
    /// Where the placeholder is.
    places: Vec<usize>,
}

impl NetnsProgram {
    /// Links the program to the maps of `loaded`, which must outlive the copies' loading.
    ///
    /// # Errors
    /// The object cannot be read, or names a map that is not there.
    pub(crate) fn new(loaded: &Ebpf) -> Result<Self, KernelError> {
        let unusable = |source: io::Error| KernelError::NetnsProgram { source };
        let invalid = |error: String| unusable(io::Error::new(io::ErrorKind::InvalidData, error));
        let mut object = Object::parse(object::BYTES).map_err(|error| invalid(error.to_string()))?;
        let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        object.programs.retain(|name, _| name == NETNS.program);
        let maps = std::mem::take(&mut object.maps);
        let with_fds =
            maps.iter().filter_map(|(name, map)| Some((name.as_str(), fd(loaded.map(name)?)?, map)));
        object.relocate_maps(with_fds, &sections).map_err(|error| invalid(error.to_string()))?;
        object.relocate_calls(&sections).map_err(|error| invalid(error.to_string()))?;
        let Some(program) = object.programs.get(NETNS.program) else {
            unreachable!("program {} is part of the object that this crate was built with", NETNS.program);
        };
        let Some(function) = object.functions.get(&program.function_key()) else {
            unreachable!("program {} has instructions", NETNS.program);
        };
        let instructions = function.instructions.clone();
        let places = places(&instructions);
        if places.is_empty() {
            return Err(invalid("the compiled program asks for no netns".to_owned()));
        }
        Ok(Self { instructions, license: program.license.clone(), places })
    }

    /// Copies for the netns `cookies`, in their order, or why the kernel refuses them.
    pub(crate) fn load_each(&self, cookies: &[u64]) -> Vec<io::Result<OwnedFd>> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let share = cookies.len().div_ceil(threads).max(1);
        let load = |cookies: &[u64]| cookies.iter().map(|cookie| self.load(*cookie)).collect::<Vec<_>>();
        let Some((own, others)) = cookies.split_at_checked(share) else { return load(cookies) };
        thread::scope(|scope| {
            let others: Vec<_> =
                others.chunks(share).map(|cookies| scope.spawn(move || load(cookies))).collect();
            let mut copies = load(own);
            for other in others {
                match other.join() {
                    Ok(more) => copies.extend(more),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            copies
        })
    }

    /// A copy for the netns `cookie`.
    ///
    /// # Errors
    /// The kernel refuses it.
    fn load(&self, cookie: u64) -> io::Result<OwnedFd> {
        let mut instructions = self.instructions.clone();
        for place in &self.places {
            let (low, high) = halves(cookie);
            instructions[*place].imm = low;
            instructions[*place + 1].imm = high;
        }
        let load = || sys::load_sk_lookup(NETNS.program, &instructions, &self.license);
        object::unless_interrupted(load, |error| Some(error.kind()))
    }
}

/// Where `instructions` load the placeholder.
fn places(instructions: &[bpf_insn]) -> Vec<usize> {
    let (low, high) = halves(NETNS_COOKIE_PLACEHOLDER);
    let loads = |pair: &[bpf_insn]| {
        pair[0].code == LOAD_NUMBER && pair[0].src_reg() == 0 && (pair[0].imm, pair[1].imm) == (low, high)
    };
    let pairs = instructions.windows(2).enumerate();
    pairs.filter(|(_, pair)| loads(pair)).map(|(place, _)| place).collect()
}

/// The halves of a number as the two instructions hold them.
fn halves(number: u64) -> (i32, i32) {
    let bytes = number.to_le_bytes();
    let half = |at: usize| i32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    (half(0), half(4))
}

/// The descriptor of a map; `None` for types that no program here has.
fn fd(map: &Map) -> Option<RawFd> {
    match map {
        Map::Array(data)
        | Map::CgroupArray(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuHashMap(data)
        | Map::RingBuf(data)
        | Map::SkStorage(data)
        | Map::SockHash(data) => Some(data.fd().as_fd().as_raw_fd()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiled_program_asks_for_its_netns() {
        let object = Object::parse(object::BYTES).unwrap();
        let program = &object.programs[NETNS.program];
        assert!(!places(&object.functions[&program.function_key()].instructions).is_empty());
    }
}

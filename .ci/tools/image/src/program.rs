//! Whether a program is static: the image has no loader and no library.

use anyhow::Context as _;
use object::{
    Architecture, Object as _,
    elf::{self, FileHeader64},
    endian::Endianness,
    read::elf::{FileHeader as _, ProgramHeader as _},
};

/// The architecture of a static program, as images name it: `amd64` or `arm64`.
///
/// # Errors
/// It is no ELF program, asks for a loader, or is of another architecture.
pub fn architecture(name: &str, bytes: &[u8]) -> anyhow::Result<&'static str> {
    let expected = || format!("{name}: expected a static ELF program of 64 bits");
    let header = FileHeader64::<Endianness>::parse(bytes).with_context(expected)?;
    let endian = header.endian().with_context(expected)?;
    let segments = header.program_headers(endian, bytes).with_context(expected)?;
    if let Some(segment) = segments.iter().find(|segment| segment.p_type(endian) == elf::PT_INTERP) {
        let loader = segment.data(endian, bytes).unwrap_or_default();
        let loader = String::from_utf8_lossy(loader).trim_end_matches('\0').to_owned();
        anyhow::bail!(
            "{name} asks for the loader {loader}, which the image does not have: link it with -C target-feature=+crt-static"
        );
    }
    match object::File::parse(bytes).with_context(expected)?.architecture() {
        Architecture::X86_64 => Ok("amd64"),
        Architecture::Aarch64 => Ok("arm64"),
        other => anyhow::bail!("{name} is for {other:?}, expected x86-64 or arm64"),
    }
}

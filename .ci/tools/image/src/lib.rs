//! Writes the container image: an OCI archive of static programs, without a container engine. The
//! same input gives the same bytes, whoever builds it where and when.
//!
//! * [`check`]: reads an archive and checks every digest in it
//! * [`archive`]: the archive, from its contents
//! * [`bill`]: the bill of materials, from what Cargo says about the dependencies
//! * [`contents`]: what is in the image
//! * [`program`]: whether a program is static
//! * [`blob`]: bytes with their digest

pub mod archive;
pub mod bill;
pub mod blob;
pub mod check;
pub mod contents;
pub mod program;

#[cfg(test)]
mod tests {
    #[test]
    fn modules_use_only_modules_below_them() {
        testbed::module_order::assert_one_way(env!("CARGO_MANIFEST_DIR"));
    }
}

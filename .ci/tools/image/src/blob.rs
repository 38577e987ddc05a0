//! Bytes with their digest, as an image names them.

use std::fmt::Write as _;

use aws_lc_rs::digest;
use serde_json::{Value, json};

/// Some bytes of an image, of one media type.
#[derive(Clone, Debug)]
pub struct Blob {
    /// What they are.
    pub media_type: &'static str,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Blob {
    /// What refers to them: media type, digest and size.
    #[must_use]
    pub fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": digest(&self.bytes), "size": self.bytes.len()})
    }

    /// Their path in the archive.
    #[must_use]
    pub fn path(&self) -> String {
        format!("blobs/sha256/{}", sha256(&self.bytes))
    }
}

/// The digest as images write it: `sha256:` and 64 hexadecimal digits.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

fn sha256(bytes: &[u8]) -> String {
    digest::digest(&digest::SHA256, bytes).as_ref().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

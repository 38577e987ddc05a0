//! The archive in the layout of OCI images, as `ctr images import`, `podman load` and `skopeo` read
//! it.

use std::{collections::BTreeMap, io::Write as _};

use anyhow::Context as _;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use tar::{Builder, EntryType};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    blob::{Blob, digest},
    contents::{self, Contents},
};

/// What an image says of itself beside its contents.
#[derive(Clone, Debug)]
pub struct About {
    /// Registry, folder, name and tag, such as `localhost/adit:0.1.0`.
    pub reference: String,
    /// `amd64` or `arm64`.
    pub architecture: &'static str,
    /// What runs unless a pod says otherwise.
    pub entrypoint: Vec<String>,
    /// Who runs it unless a pod says otherwise, such as `1337:1337`; empty: root.
    pub user: String,
    /// The variable `PATH`.
    pub path: String,
    /// Labels (`org.opencontainers.image.…`).
    pub labels: BTreeMap<String, String>,
    /// Seconds after 1970 that every file and the image have as their time: `SOURCE_DATE_EPOCH`.
    pub modified: u64,
}

/// The archive of an image with one layer.
///
/// # Errors
/// The reference has no tag, or a path is too long.
pub fn archive(contents: &Contents, about: &About) -> anyhow::Result<Vec<u8>> {
    let (_, tag) = about
        .reference
        .rsplit_once(':')
        .filter(|(name, tag)| !name.is_empty() && !tag.is_empty() && !tag.contains('/'))
        .with_context(|| {
            format!("{}: expected a name with a tag, such as localhost/adit:0.1.0", about.reference)
        })?;
    let layer = contents.layer(about.modified)?;
    let diff_id = digest(&layer);
    // Without a name and a time in its head.
    let mut compressor = GzBuilder::new().write(Vec::new(), Compression::best());
    compressor.write_all(&layer)?;
    let layer =
        Blob { media_type: "application/vnd.oci.image.layer.v1.tar+gzip", bytes: compressor.finish()? };
    let created = timestamp(about.modified)?;
    let mut runs = json!({
        "Entrypoint": about.entrypoint,
        "Env": [format!("PATH={}", about.path)],
        "Labels": about.labels,
        "WorkingDir": "/",
    });
    if !about.user.is_empty() {
        runs["User"] = json!(about.user);
    }
    let config = Blob {
        media_type: "application/vnd.oci.image.config.v1+json",
        bytes: serde_json::to_vec(&json!({
            "created": created,
            "architecture": about.architecture,
            "os": "linux",
            "config": runs,
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created": created, "created_by": "adit-image"}],
        }))?,
    };
    let manifest = Blob {
        media_type: "application/vnd.oci.image.manifest.v1+json",
        bytes: serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor(),
            "layers": [layer.descriptor()],
            "annotations": about.labels,
        }))?,
    };
    let mut entry = manifest.descriptor();
    entry["platform"] = json!({"architecture": about.architecture, "os": "linux"});
    // containerd names the image by the first; others take the second for the tag.
    entry["annotations"] = json!({
        "io.containerd.image.name": about.reference,
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    pack(&index, &[layer, config, manifest], about.modified)
}

fn pack(index: &Value, blobs: &[Blob], modified: u64) -> anyhow::Result<Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> =
        blobs.iter().map(|blob| (blob.path(), blob.bytes.clone())).collect();
    files.insert("index.json".to_owned(), serde_json::to_vec(index)?);
    files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    let mut tar = Builder::new(Vec::new());
    for folder in ["blobs/", "blobs/sha256/"] {
        let mut header = contents::header(EntryType::Directory, 0o755, 0, modified);
        tar.append_data(&mut header, folder, std::io::empty())?;
    }
    for (path, bytes) in files {
        let mut header = contents::header(EntryType::Regular, 0o644, bytes.len() as u64, modified);
        tar.append_data(&mut header, path, bytes.as_slice())?;
    }
    Ok(tar.into_inner()?)
}

/// Seconds after 1970 as RFC 3339 writes them.
fn timestamp(seconds: u64) -> anyhow::Result<String> {
    let expected =
        || format!("SOURCE_DATE_EPOCH is {seconds}: expected seconds after 1970, before the year 10000");
    let time =
        i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.with_context(expected)?.format(&Rfc3339).with_context(expected)
}

//! Reads an archive as a container runtime does, and checks every digest and size in it.

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
};

use anyhow::Context as _;
use flate2::read::GzDecoder;
use serde_json::Value;
use tar::{Archive, EntryType};

use crate::{
    blob::digest,
    contents::{Contents, File},
};

/// An image that was read and found whole.
#[derive(Clone, Debug)]
pub struct Image {
    /// The name by which containerd imports it.
    pub name: String,
    /// The digest of its manifest.
    pub digest: String,
    /// Its configuration.
    pub config: Value,
    /// Its files.
    pub contents: Contents,
}

/// Reads the image in `archive`.
///
/// # Errors
/// Something is missing, or is not what its digest says; the layer has anything but files and
/// folders of root.
pub fn read(archive: &[u8]) -> anyhow::Result<Image> {
    let files = files(archive)?;
    let layout = json(files.get("oci-layout").context("no oci-layout")?)?;
    anyhow::ensure!(layout["imageLayoutVersion"] == "1.0.0", "oci-layout: {layout}");
    let index = json(files.get("index.json").context("no index.json")?)?;
    let entry = &index["manifests"][0];
    let manifest = json(blob(&files, entry)?)?;
    let config = json(blob(&files, &manifest["config"])?)?;
    let layers = manifest["layers"].as_array().context("the manifest has no layers")?;
    anyhow::ensure!(layers.len() == 1, "{} layers, expected one", layers.len());
    let mut layer = Vec::new();
    GzDecoder::new(blob(&files, &layers[0])?.as_slice()).read_to_end(&mut layer).context("the layer")?;
    let diff_id = &config["rootfs"]["diff_ids"][0];
    anyhow::ensure!(
        digest(&layer) == *diff_id,
        "the layer is {}, the configuration names {diff_id}",
        digest(&layer)
    );
    let name = entry["annotations"]["io.containerd.image.name"].as_str().context("the image has no name")?;
    Ok(Image {
        name: name.to_owned(),
        digest: entry["digest"].as_str().unwrap_or_default().to_owned(),
        contents: contents(&layer)?,
        config,
    })
}

fn files(archive: &[u8]) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in Archive::new(archive).entries()? {
        let mut entry = entry.context("the archive")?;
        if entry.header().entry_type() == EntryType::Regular {
            files.insert(entry.path()?.display().to_string(), bytes(&mut entry)?);
        }
    }
    Ok(files)
}

/// The bytes that a descriptor refers to.
fn blob<'a>(files: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value) -> anyhow::Result<&'a Vec<u8>> {
    let expected = descriptor["digest"].as_str().with_context(|| format!("no digest in {descriptor}"))?;
    let path = format!("blobs/{}", expected.replacen(':', "/", 1));
    let found = files.get(&path).with_context(|| format!("no {path}"))?;
    anyhow::ensure!(digest(found) == expected, "{path}: its digest is {}", digest(found));
    anyhow::ensure!(
        descriptor["size"] == found.len(),
        "{path}: {} bytes, expected {}",
        found.len(),
        descriptor["size"]
    );
    Ok(found)
}

fn contents(layer: &[u8]) -> anyhow::Result<Contents> {
    let mut contents = Contents::default();
    for entry in Archive::new(layer).entries()? {
        let mut entry = entry.context("the layer")?;
        let path = format!("/{}", entry.path()?.display());
        let header = entry.header();
        let (kind, mode) = (header.entry_type(), header.mode()?);
        anyhow::ensure!(header.uid()? == 0 && header.gid()? == 0, "{path} is not root's");
        match kind {
            EntryType::Directory => {}
            EntryType::Regular => {
                let bytes = bytes(&mut entry)?;
                contents.add(&path, File { bytes, is_program: mode & 0o111 != 0 })?;
            }
            other => anyhow::bail!("{path} is {other:?}, expected a file or a folder"),
        }
    }
    Ok(contents)
}

fn bytes(entry: &mut tar::Entry<'_, impl io::Read>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn json(bytes: &[u8]) -> anyhow::Result<Value> {
    serde_json::from_slice(bytes).context("not JSON")
}

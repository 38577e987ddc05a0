//! Writes the container image and reads it back. `make image` calls it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use adit_image::{
    archive::{About, archive},
    bill, check,
    contents::{Contents, File},
    program,
};
use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

/// Where the programs are in the image; its `PATH`.
const PROGRAMS: &str = "/usr/local/bin";

/// The container image as an OCI archive, without a container engine.
#[derive(Debug, Parser)]
#[command(name = "adit-image", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the archive
    Write(WriteArgs),
    /// Read an archive and check every digest in it; print its name and the digest of its manifest
    Check {
        archive: PathBuf,
        /// Also write the image's files into this folder
        #[arg(long, value_name = "FOLDER")]
        unpack: Option<PathBuf>,
    },
    /// Write the bill of materials (CycloneDX)
    Bill(BillArgs),
}

#[derive(Debug, Args)]
struct WriteArgs {
    /// The archive
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Registry, folder, name and tag, such as localhost/adit:0.1.0
    #[arg(long, value_name = "NAME:TAG")]
    name: String,
    /// A static program; repeatable. The first runs unless a pod says otherwise
    #[arg(long = "program", value_name = "FILE", required = true)]
    programs: Vec<PathBuf>,
    /// A file and where it is in the image; repeatable
    #[arg(long = "file", value_name = "FILE=PATH", value_parser = placed)]
    files: Vec<(PathBuf, String)>,
    /// A label; repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// The time of every file, in seconds after 1970
    #[arg(long, env = "SOURCE_DATE_EPOCH", default_value = "0")]
    modified: u64,
}

#[derive(Debug, Args)]
struct BillArgs {
    /// The bill
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What `cargo metadata --format-version 1 --filter-platform TARGET` printed
    #[arg(long, value_name = "FILE")]
    metadata: PathBuf,
    #[arg(long, value_name = "FILE", default_value = "Cargo.lock")]
    lock: PathBuf,
    /// Packages of the workspace whose programs are in the image
    #[arg(required = true)]
    packages: Vec<String>,
}

fn placed(text: &str) -> Result<(PathBuf, String), String> {
    let (file, path) = text.split_once('=').ok_or("expected FILE=PATH")?;
    Ok((file.into(), path.to_owned()))
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Write(args) => write(args),
        Command::Check { archive, unpack } => read(&archive, unpack.as_deref()),
        Command::Bill(args) => write_bill(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("adit-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(args: WriteArgs) -> anyhow::Result<()> {
    let mut contents = Contents::default();
    let mut architecture = None;
    let mut entrypoint = None;
    for path in &args.programs {
        let bytes = fs::read(path).with_context(|| format!("{}", path.display()))?;
        let name = path.file_name().and_then(|name| name.to_str()).context("a program without a name")?;
        let of = program::architecture(&path.display().to_string(), &bytes)?;
        let first = *architecture.get_or_insert(of);
        anyhow::ensure!(of == first, "{} is for {of}, the program before it for {first}", path.display());
        let inside = format!("{PROGRAMS}/{name}");
        contents.add(&inside, File { bytes, is_program: true })?;
        entrypoint.get_or_insert(inside);
    }
    for (path, inside) in args.files {
        let bytes = fs::read(&path).with_context(|| format!("{}", path.display()))?;
        contents.add(&inside, File { bytes, is_program: false })?;
    }
    let about = About {
        reference: args.name,
        architecture: architecture.context("no program")?,
        entrypoint: entrypoint.into_iter().collect(),
        user: String::new(),
        path: PROGRAMS.to_owned(),
        labels: args.labels.into_iter().collect::<BTreeMap<_, _>>(),
        modified: args.modified,
    };
    let bytes = archive(&contents, &about)?;
    fs::write(&args.out, bytes).with_context(|| format!("{}", args.out.display()))
}

fn read(path: &Path, unpack: Option<&Path>) -> anyhow::Result<()> {
    let bytes = fs::read(path).with_context(|| format!("{}", path.display()))?;
    let image = check::read(&bytes).with_context(|| format!("{}", path.display()))?;
    if let Some(folder) = unpack {
        image.contents.unpack(folder).with_context(|| format!("{}", folder.display()))?;
    }
    println!("{} {}", image.name, image.digest);
    Ok(())
}

fn write_bill(args: &BillArgs) -> anyhow::Result<()> {
    let text = |path: &Path| fs::read_to_string(path).with_context(|| format!("{}", path.display()));
    let metadata = serde_json::from_str(&text(&args.metadata)?).context("the metadata is not JSON")?;
    let bill = bill::bill(&metadata, &text(&args.lock)?, &args.packages)?;
    let bytes = serde_json::to_string_pretty(&bill)? + "\n";
    fs::write(&args.out, bytes).with_context(|| format!("{}", args.out.display()))
}

//! `ztunnel config`: checks and prints the configuration, without running.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Subcommand;
use ztunnel::{
    config::{Config, Effective, Origin},
    mesh::local_file,
};

use super::Output;

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Checks the configuration and reports every error.
    ///
    /// Exit code 0: valid; 1: invalid.
    #[command(after_help = "Examples:
  ztunnel config check                               the environment alone
  ztunnel config check /etc/adit/ztunnel.yaml        the file, with the environment over it")]
    Check {
        /// The file to check; default: --config.
        file: Option<PathBuf>,
    },
    /// Prints every key with its effective value and where the value comes from. Secrets are never
    /// shown.
    #[command(after_help = "Examples:
  ztunnel --config /etc/adit/ztunnel.yaml config print
  ztunnel config print -o yaml > ztunnel.yaml        the effective configuration, as a file")]
    Print {
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

pub(crate) fn run(command: ConfigCommand, file: Option<PathBuf>) -> Result<()> {
    match command {
        ConfigCommand::Check { file: own } => check(own.or(file).as_deref()),
        ConfigCommand::Print { output } => print(file.as_deref(), output),
    }
}

fn check(file: Option<&Path>) -> Result<()> {
    let config = Config::load(file)?;
    local_file::load(&config)?;
    let count = |origin| config.effective.iter().filter(|key| key.origin == origin).count();
    let from_file = file
        .map_or_else(String::new, |file| format!("{} keys from {}, ", count(Origin::File), file.display()));
    let (environment, default) = (count(Origin::Environment), count(Origin::Default));
    writeln!(
        io::stdout(),
        "the configuration is valid: {from_file}{environment} from the environment, {default} not set"
    )?;
    Ok(())
}

fn print(file: Option<&Path>, output: Output) -> Result<()> {
    let config = Config::load(file)?;
    let text = match output {
        Output::Json => serde_json::to_string_pretty(&config.effective)? + "\n",
        Output::Yaml => yaml(&config.effective)?,
        Output::Text => table(&config.effective),
    };
    Ok(io::stdout().write_all(text.as_bytes())?)
}

/// A configuration file with the same effect, except for secrets.
fn yaml(keys: &[Effective]) -> Result<String> {
    let mut text = String::new();
    let mut open: Vec<&str> = Vec::new();
    for key in keys {
        let mut path: Vec<&str> = key.key.split('.').collect();
        let name = path.pop().unwrap_or_default();
        let common = open.iter().zip(&path).take_while(|(a, b)| a == b).count();
        for (depth, section) in path.iter().enumerate().skip(common) {
            writeln!(text, "{}{section}:", "  ".repeat(depth))?;
        }
        open.clone_from(&path);
        let indent = "  ".repeat(path.len());
        match &key.value {
            Some(value) if !key.hidden => {
                // A JSON string is a YAML string.
                let value = serde_json::to_string(value).context("a value is not text")?;
                writeln!(text, "{indent}{name}: {value}")?;
            }
            _ => writeln!(text, "{indent}# {name}: {}", key.value.as_deref().unwrap_or_default())?,
        }
    }
    Ok(text)
}

fn table(keys: &[Effective]) -> String {
    let width = |cell: fn(&Effective) -> &str| keys.iter().map(|key| cell(key).len()).max().unwrap_or(0);
    let (name, value) = (width(|key| key.key), width(|key| key.value.as_deref().unwrap_or("-")).min(60));
    let mut text = String::new();
    for key in keys {
        let from = match key.origin {
            Origin::Default => "default".to_owned(),
            Origin::File => "file".to_owned(),
            Origin::Environment => format!("environment ({})", key.variable),
        };
        let shown = key.value.as_deref().unwrap_or("-").replace('\n', "\\n");
        let _ = writeln!(text, "{:name$}  {shown:value$}  {from}", key.key);
    }
    text
}

//! `ztunnel-control rotate-root`: the root is replaced by a new one, without a moment in which two
//! tunnels do not trust each other. The control planes do the work, by what the Secret holds: this
//! command begins it and shows how far it is, and may be ended at any time.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use ztunnel_control::authority::{
    place::RootPlace,
    progress::{Progress, Step},
    secret::{self, RootSecret},
};

/// With `--wait`: how often is looked.
const LOOK: Duration = Duration::from_secs(1);

/// Replace the root by a new one; both are trusted until every certificate is renewed
#[derive(Debug, Args)]
#[command(
    after_help = "It begins a rotation, or shows the one that goes on. The control planes do the rest, whether this
command runs or not: it may be ended at any time, and run again.

Examples:
  kubectl -n adit-system exec deployment/ztunnel-control -- ztunnel-control rotate-root
  ztunnel-control rotate-root --status -o json
  ztunnel-control rotate-root --wait"
)]
pub(crate) struct RotateRoot {
    /// Begin nothing; show how far the rotation is
    #[arg(long, conflicts_with = "abort")]
    status: bool,
    /// Show each step, and return when the rotation has ended
    #[arg(long)]
    wait: bool,
    /// Give up the next root, if it does not sign yet
    #[arg(long, conflicts_with = "wait")]
    abort: bool,
    /// The format of the output; JSON has one object on each line
    #[arg(short, long, value_enum, default_value = "human", value_name = "FORMAT")]
    output: Output,
}

/// How a command prints.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Output {
    Human,
    Json,
}

impl RotateRoot {
    pub(crate) async fn run(self, client: Client, place: &RootPlace) -> Result<()> {
        let name = format!("{}/{}", place.namespace, place.secret);
        let mut shown = None;
        let mut begins = !self.status && !self.abort;
        loop {
            let secret = place.read(&client).await?;
            let secret = secret.with_context(|| {
                format!("there is no Secret {name}: the control plane makes it when it starts")
            })?;
            let read = RootSecret::read(&secret)
                .with_context(|| format!("Secret {name} has no usable root: fix it first"))?;
            let progress = Progress::of(&name, &read)?;
            if self.abort && progress.step == Step::Retire {
                bail!("the new root signs already: wait for the end, and rotate again if you want another");
            }
            let change = if self.abort && progress.step == Step::Trust {
                Some(secret::without_next(secret))
            } else if begins && progress.step == Step::Idle {
                Some(next(secret, place, &name)?)
            } else {
                None
            };
            if let Some(change) = change {
                // Whoever was faster: what is there now is looked at again.
                begins = place.replace(&client, &change).await?.is_none();
                continue;
            }
            begins = false;
            let is_over = progress.step == Step::Idle;
            if shown.as_ref() != Some(&progress) {
                self.print(&progress)?;
                shown = Some(progress);
            }
            if is_over || !self.wait {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn print(&self, progress: &Progress) -> Result<()> {
        let mut out = io::stdout().lock();
        match self.output {
            Output::Human => writeln!(out, "{progress}")?,
            Output::Json => writeln!(out, "{}", serde_json::to_string(progress)?)?,
        }
        Ok(())
    }
}

fn next(secret: Secret, place: &RootPlace, name: &str) -> Result<Secret> {
    if !secret::is_made(&secret) {
        bail!(
            "Secret {name} was brought by somebody: put the new root beside the one before into its ca.crt, wait \
             for as long as certificates last, change tls.crt and tls.key, and wait again"
        );
    }
    Ok(secret::with_next(secret, &place.trust_domain)?)
}

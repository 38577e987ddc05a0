//! `ztunnel-control revoke`: certificates that are refused although their time is not over.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use serde_json::json;
use ztunnel_control::authority::{
    place::RootPlace,
    revoked::Serial,
    secret::{self, RootSecret},
};

use crate::rotate_root::Output;

/// How often another one may change the Secret at the same moment.
const ATTEMPTS: usize = 10;

/// Have tunnels refuse certificates, by serial number; without one, show which are revoked
#[derive(Debug, Args)]
#[command(
    after_help = "Tunnels read the list if the control plane writes one (--crl-config-map), and they are told where it is
(CRL_PATH): the chart's peerCaCrl.enabled does both. A certificate is on it until it would have ended.

Examples:
  ztunnel-control revoke 4a:3f:00:12
  ztunnel-control revoke -o json"
)]
pub(crate) struct Revoke {
    /// Serial numbers in hexadecimal digits, as `ztunnel` and `openssl x509 -serial` show them
    #[arg(value_name = "SERIAL")]
    serials: Vec<Serial>,
    /// The format of the output
    #[arg(short, long, value_enum, default_value = "human", value_name = "FORMAT")]
    output: Output,
}

impl Revoke {
    pub(crate) async fn run(self, client: Client, place: &RootPlace) -> Result<()> {
        let name = format!("{}/{}", place.namespace, place.secret);
        for _ in 0..ATTEMPTS {
            let secret = place.read(&client).await?;
            let secret = secret.with_context(|| {
                format!("there is no Secret {name}: the control plane makes it when it starts")
            })?;
            let read = RootSecret::read(&secret)
                .with_context(|| format!("Secret {name} has no usable root: fix it first"))?;
            let mut revoked = read.revoked;
            let before = revoked.len();
            let now = Timestamp::from_second(Timestamp::now().as_second())?;
            for serial in &self.serials {
                revoked.entry(serial.clone()).or_insert(now);
            }
            if revoked.len() > before
                && place.replace(&client, &secret::with_revoked(secret, &revoked)).await?.is_none()
            {
                continue;
            }
            let mut out = io::stdout().lock();
            for (serial, since) in &revoked {
                match self.output {
                    Output::Human => writeln!(out, "{serial}  revoked at {since}")?,
                    Output::Json => {
                        writeln!(out, "{}", json!({"serial": serial.to_string(), "revoked_at": since}))?;
                    }
                }
            }
            return Ok(());
        }
        bail!("others change Secret {name} all the time; try again")
    }
}

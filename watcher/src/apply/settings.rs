//! The programs' settings, which hold for the whole node.

use std::net::IpAddr;

use adit_ebpf_common::{address::UNSPECIFIED, settings::Settings};
use adit_ebpf_loader::{Kernel, KernelError};
use error_reporter::Report;
use tracing::error;

use crate::plan::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, address16};

/// The settings as they were written last.
#[derive(Debug)]
pub(crate) struct KernelSettings(Settings);

impl KernelSettings {
    /// Writes the settings of this run. Whether a tunnel serves is taken over from an earlier run;
    /// tracing is off. At most three `resolvers` count.
    ///
    /// # Errors
    /// The map cannot be read or written.
    pub(crate) fn open(kernel: &mut Kernel, resolvers: &[IpAddr]) -> Result<Self, KernelError> {
        let before = kernel.settings()?;
        let mut slots = [UNSPECIFIED; 3];
        for (slot, resolver) in slots.iter_mut().zip(resolvers) {
            *slot = address16(*resolver);
        }
        let settings = Settings {
            outbound_port: OUTBOUND_PORT,
            inbound_port: INBOUND_PORT,
            hbone_port: HBONE_PORT,
            tunnel_up: before.tunnel_up,
            debug: 0,
            debug_port: 0,
            debug_address: UNSPECIFIED,
            resolvers: slots,
            dns_port: DNS_PORT,
            pad: 0,
        };
        kernel.set_settings(&settings)?;
        Ok(Self(settings))
    }

    /// Whether the programs send traffic to a tunnel.
    #[must_use]
    pub(crate) fn tunnel_up(&self) -> bool {
        self.0.tunnel_up == 1
    }

    /// Has the programs send traffic to a tunnel, or follow every pod's fail mode.
    pub(crate) fn set_tunnel_up(&mut self, kernel: &mut Kernel, up: bool) {
        self.change(kernel, |settings| settings.tunnel_up = up.into());
    }

    /// Has the programs report their verdicts, about `port` and `address` only where these are
    /// given.
    pub(crate) fn start_trace(&mut self, kernel: &mut Kernel, port: Option<u16>, address: Option<IpAddr>) {
        self.change(kernel, |settings| {
            settings.debug = 1;
            settings.debug_port = port.map_or(0, u32::from);
            settings.debug_address = address.map_or(UNSPECIFIED, address16);
        });
    }

    /// Has the programs report nothing.
    pub(crate) fn stop_trace(&mut self, kernel: &mut Kernel) {
        self.change(kernel, |settings| settings.debug = 0);
    }

    /// Writes the settings if they differ.
    fn change(&mut self, kernel: &mut Kernel, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.0;
        change(&mut settings);
        if settings == self.0 {
            return;
        }
        match kernel.set_settings(&settings) {
            Ok(()) => self.0 = settings,
            Err(error) => error!(error = %Report::new(&error), "cannot write the settings"),
        }
    }
}

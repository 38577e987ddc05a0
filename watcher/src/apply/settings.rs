//! The programs' settings, which hold for the whole node.

use std::{collections::BTreeSet, net::IpAddr};

use adit_ebpf_common::{
    address::{Address, UNSPECIFIED},
    settings::{Settings, trace_filter},
};
use adit_ebpf_loader::{Kernel, KernelError};
use error_reporter::Report;
use tracing::{error, warn};

use crate::plan::{DNS_PORT, HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, address16};

/// What the programs report of their verdicts: at least what any client of a trace wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KernelFilter {
    /// Only this port; `None`: any.
    pub port: Option<u16>,
    /// Only this address; `None`: any.
    pub address: Option<IpAddr>,
    /// Only what these marks name; `None`: everything.
    pub watched: Option<BTreeSet<Address>>,
    /// Ranges, with their prefix lengths in IPv6 form, that nobody wants to see.
    pub left_out: BTreeSet<(Address, u32)>,
}

/// The settings as they were written last.
#[derive(Debug)]
pub(crate) struct KernelSettings(Settings);

impl KernelSettings {
    /// Writes the settings of this run. Whether a tunnel serves is taken over from an earlier run,
    /// or told by the tunnels' listeners where the settings are new; tracing is off. At most three `resolvers` count.
    ///
    /// # Errors
    /// The map cannot be read or written.
    pub(crate) fn open(kernel: &mut Kernel, resolvers: &[IpAddr]) -> Result<Self, KernelError> {
        let before = kernel.settings()?;
        let is_new = before.outbound_port == 0;
        let has_listener = || kernel.tunnel_listeners().map(|listeners| !listeners.is_empty());
        let tunnel_up = if is_new { has_listener()?.into() } else { before.tunnel_up };
        let mut slots = [UNSPECIFIED; 3];
        for (slot, resolver) in slots.iter_mut().zip(resolvers) {
            *slot = address16(*resolver);
        }
        let settings = Settings {
            outbound_port: OUTBOUND_PORT,
            inbound_port: INBOUND_PORT,
            hbone_port: HBONE_PORT,
            tunnel_up,
            debug: 0,
            debug_port: 0,
            debug_address: UNSPECIFIED,
            resolvers: slots,
            dns_port: DNS_PORT,
            trace_filter: 0,
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

    /// Has the programs report their verdicts as `wanted`; so far they filter by `before`. What the
    /// maps have no room for is not filtered there.
    pub(crate) fn trace(&mut self, kernel: &mut Kernel, before: &KernelFilter, wanted: &KernelFilter) {
        if self.0.debug == 1 && before == wanted {
            return;
        }
        let none = BTreeSet::new();
        let (old, new) = (before.watched.as_ref().unwrap_or(&none), wanted.watched.as_ref().unwrap_or(&none));
        // What is wanted is there before it is asked for, and what is not goes after that.
        let watched = new.difference(old).try_for_each(|key| kernel.watch(key, true));
        let added = wanted.left_out.difference(&before.left_out);
        let left_out =
            added.clone().try_for_each(|(address, length)| kernel.leave_out(*address, *length, true));
        for error in [&watched, &left_out].into_iter().filter_map(|done| done.as_ref().err()) {
            warn!(error = %Report::new(error), "the programs cannot filter the trace");
        }
        let by_pod = if wanted.watched.is_some() && watched.is_ok() { trace_filter::WATCHED } else { 0 };
        let by_range = if wanted.left_out.is_empty() { 0 } else { trace_filter::LEFT_OUT };
        self.change(kernel, |settings| {
            settings.debug = 1;
            settings.debug_port = wanted.port.map_or(0, u32::from);
            settings.debug_address = wanted.address.map_or(UNSPECIFIED, address16);
            settings.trace_filter = by_pod | by_range;
        });
        forget(kernel, old.difference(new), before.left_out.difference(&wanted.left_out));
    }

    /// Has the programs report nothing, and forget what they filtered by.
    pub(crate) fn stop_trace(&mut self, kernel: &mut Kernel, before: &KernelFilter) {
        self.change(kernel, |settings| settings.debug = 0);
        forget(kernel, before.watched.iter().flatten(), before.left_out.iter());
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

/// Removes entries of the trace's maps. One that stays costs a record that nobody gets.
fn forget<'a>(
    kernel: &mut Kernel,
    mut watched: impl Iterator<Item = &'a Address>,
    mut left_out: impl Iterator<Item = &'a (Address, u32)>,
) {
    let done = watched
        .try_for_each(|key| kernel.watch(key, false))
        .and_then(|()| left_out.try_for_each(|(address, length)| kernel.leave_out(*address, *length, false)));
    if let Err(error) = done {
        warn!(error = %Report::new(&error), "cannot remove a filter of the trace");
    }
}

//! How a step is done.
//!
//! * [`netns_setup`]: the rule, route and sysctl by which the application sees the client's address
//! * [`maps`]: the kernel's maps and links
//! * [`zds_server`]: ZDS, the protocol in which tunnels get their pods
//! * [`journal`]: what was changed outside the maps, on disk, so that it can be undone after a crash
//! * [`restore`]: taking all of that back

pub mod journal;
pub mod maps;
pub mod netns_setup;
pub mod restore;
pub mod zds_server;

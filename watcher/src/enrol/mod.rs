//! How a step is done.
//!
//! * [`prepare_netns`]: the rule, route and sysctl by which the application sees the client's address
//! * [`publish`]: the kernel's maps and links
//! * [`hand_over`]: ZDS, the protocol in which tunnels get their pods
//! * [`records`]: what was changed outside the maps, on disk, so that it can be undone after a crash
//! * [`undo`]: taking all of that back

pub mod hand_over;
pub mod prepare_netns;
pub mod publish;
pub mod records;
pub mod undo;

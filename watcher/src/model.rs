//! The values that all other modules share. Nothing here depends on a source or on the kernel.
//!
//! * [`pod`]: a pod as its source describes it
//! * [`lists`]: what pods, namespaces and the mesh exclude and include, and what follows
//! * [`exclusions`]: ports and address ranges that bypass the tunnel
//! * [`guards`]: processes that bypass it
//! * [`notes`]: what was ignored of a pod's configuration
//! * [`state`]: the state of a pod's traffic
//! * [`reserved_port`]: applications that use the tunnel's ports
//! * [`reason`]: why a pod is not carried, or a tunnel not used

pub mod exclusions;
pub mod guards;
pub mod lists;
pub mod notes;
pub mod pod;
pub mod reason;
pub mod reserved_port;
pub mod state;

//! The values that every other module speaks in. Nothing here knows where they come from or what is done with them.
//!
//! * [`pod`]: a pod and what its source says of it
//! * [`exclusions`]: ports and ranges of addresses that are left alone
//! * [`state`]: what becomes of a pod's traffic
//! * [`reason`]: why something is not as wished
//! * [`error_chain`]: an error with its causes, on one line

pub mod error_chain;
pub mod exclusions;
pub mod pod;
pub mod reason;
pub mod state;

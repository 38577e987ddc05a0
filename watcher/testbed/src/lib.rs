//! What the tests, the demo and the benchmarks of all crates stand on. No program depends on it.
//!
//! * [`module_order`]: checks that a crate's modules depend on each other in the order that its root lists

pub mod module_order;

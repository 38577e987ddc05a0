//! What the tests, the demo and the benchmarks of all crates stand on. No program depends on it.
//!
//! * [`doc_table`]: checks tables of `docs/` against the code that they are made from
//! * [`module_order`]: checks that a crate's modules depend on each other in the order that its root lists

pub mod doc_table;
pub mod module_order;

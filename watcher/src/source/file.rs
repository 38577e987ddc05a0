//! A pods file as a source.
//!
//! * `parse`: the file's text to pods
//! * [`watch`]: reads it again whenever it may have changed

pub(crate) mod parse;
pub mod watch;

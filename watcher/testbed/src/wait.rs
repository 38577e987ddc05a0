//! Waiting for a condition, with a deadline. Tests never sleep for a fixed time and hope.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long [`wait_for`] waits. Long enough for a loaded machine; a test that passes never waits that
/// long.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Times that in an emulated machine, which may wait for a processor of the loaded one.
const EMULATED: u32 = 4;

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(5);
/// The same where a look is costly.
const LONG_PAUSE: Duration = Duration::from_millis(300);

/// What can be waited for: `true`, or the value in an `Option`.
pub trait Condition {
    /// What the wait returns.
    type Value;

    /// The value, if the condition holds.
    fn value(self) -> Option<Self::Value>;
}

impl Condition for bool {
    type Value = ();

    fn value(self) -> Option<()> {
        self.then_some(())
    }
}

impl<T> Condition for Option<T> {
    type Value = T;

    fn value(self) -> Self {
        self
    }
}

/// Calls `look` until it returns `true` or `Some` value.
///
/// # Panics
/// When it has not within [`LIMIT`], or some times that in an emulated machine; the message contains
/// `what`.
pub fn wait_for<C: Condition>(what: &str, look: impl FnMut() -> C) -> C::Value {
    let limit = if adit_vm::is_inside() { EMULATED * LIMIT } else { LIMIT };
    wait_at_most(limit, what, look)
}

/// The same with a limit of the caller's, for a condition that must hold soon.
///
/// # Panics
/// When it does not hold within `limit`; the message contains `what`.
pub fn wait_at_most<C: Condition>(limit: Duration, what: &str, look: impl FnMut() -> C) -> C::Value {
    try_wait(limit, look).unwrap_or_else(|| panic!("waited {limit:?} in vain for {what}"))
}

/// The same where each look is a program that takes a processor for a while: with longer pauses.
///
/// # Panics
/// As of [`wait_at_most`].
pub fn wait_slowly<C: Condition>(limit: Duration, what: &str, look: impl FnMut() -> C) -> C::Value {
    try_wait_slowly(limit, look).unwrap_or_else(|| panic!("waited {limit:?} in vain for {what}"))
}

/// The same; `None` when the condition does not hold within `limit`.
pub fn try_wait_slowly<C: Condition>(limit: Duration, look: impl FnMut() -> C) -> Option<C::Value> {
    wait_with(LONG_PAUSE, limit, look)
}

/// The same as [`wait_at_most`]; `None` when the condition does not hold within `limit`. For messages
/// that need more than the name of the condition.
pub fn try_wait<C: Condition>(limit: Duration, look: impl FnMut() -> C) -> Option<C::Value> {
    wait_with(PAUSE, limit, look)
}

fn wait_with<C: Condition>(
    pause: Duration,
    limit: Duration,
    mut look: impl FnMut() -> C,
) -> Option<C::Value> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = look().value() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(pause);
    }
}

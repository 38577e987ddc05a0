//! How soon a watch begins again. One that ends without an error is begun anew at once by `kube`, so
//! that an API server that ends all of them would be asked thousands of times a second, by each node.

use std::{sync::Mutex, time::Duration};

use http::Uri;
use tokio::time::Instant;

/// Between the beginnings of two watches.
const PAUSE: Duration = Duration::from_secs(1);

/// When watches of one kind of object begin.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<Option<Instant>>);

impl Pace {
    /// When a request for `uri` may be sent; it counts as sent then. `None`: at once.
    pub(super) fn turn_of(&self, uri: &Uri) -> Option<Instant> {
        if !uri.query()?.split('&').any(|pair| pair.starts_with("watch=")) {
            return None;
        }
        let mut begun = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = Instant::now();
        let turn = begun.map_or(now, |last| now.max(last + PAUSE));
        *begun = Some(turn);
        (turn > now).then_some(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_watch_begins_a_second_after_the_last_one_and_lists_do_not_wait() {
        let pace = Pace::default();
        let wait = |uri: &'static str| {
            pace.turn_of(&Uri::from_static(uri)).map(|turn| turn.duration_since(Instant::now()))
        };
        let (list, watch) =
            ("https://api/api/v1/pods", "https://api/api/v1/pods?timeoutSeconds=9&watch=true");
        assert_eq!((wait(list), wait(watch), wait(list)), (None, None, None));
        tokio::time::advance(PAUSE / 4).await;
        assert_eq!(wait(watch), Some(PAUSE * 3 / 4));
        assert_eq!(wait(watch), Some(PAUSE * 7 / 4));
        tokio::time::advance(PAUSE * 3).await;
        assert_eq!(wait(watch), None);
    }
}

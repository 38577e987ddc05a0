//! One kind of object, listed and watched for ever.
//!
//! `kube`'s watcher resumes at the last version that it saw, and lists again when that is too old
//! for the server.

use std::{collections::HashMap, fmt::Debug, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _};
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::{metrics::Metrics, objects::ObjectKey};

/// How long one watch lasts. A connection that died silently is noticed soon after that.
pub(crate) const WATCH: Duration = Duration::from_mins(2);

/// What the server said of one kind.
#[derive(Debug)]
pub(super) enum Update<T> {
    /// Everything of this kind; what is not in it is gone.
    Listed(HashMap<ObjectKey, T>),
    /// One object; `None`: it is gone, or does not count any more.
    One(ObjectKey, Option<T>),
}

/// A kind that is followed, and where its changes go.
pub(super) struct Kind<C> {
    /// For messages, as RBAC rules name it.
    pub what: &'static str,
    /// Its resource need not be installed: then there is none.
    pub optional: bool,
    pub metrics: Arc<Metrics>,
    pub sender: mpsc::Sender<C>,
}

impl<C: Send + 'static> Kind<C> {
    /// Follows objects of one type, of which `read` keeps what counts.
    pub(super) async fn follow<K, T: Send>(
        self,
        api: Api<K>,
        read: impl Fn(&K) -> Option<T> + Send,
        change: fn(Update<T>) -> C,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let seconds = u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default().timeout(seconds);
        let mut events = watcher::watcher(api, config).default_backoff().boxed();
        let mut listing = HashMap::new();
        let mut failing = false;
        loop {
            let update = match events.try_next().await {
                Ok(Some(event)) => {
                    if failing && !matches!(event, Event::Init) {
                        failing = false;
                        info!(what = self.what, "the API server answers again");
                    }
                    match event {
                        Event::Init => {
                            listing.clear();
                            continue;
                        }
                        Event::InitApply(object) => {
                            if let Some(kept) = read(&object) {
                                listing.insert(ObjectKey::of(object.meta()), kept);
                            }
                            continue;
                        }
                        Event::InitDone => Update::Listed(std::mem::take(&mut listing)),
                        Event::Apply(object) => Update::One(ObjectKey::of(object.meta()), read(&object)),
                        Event::Delete(object) => Update::One(ObjectKey::of(object.meta()), None),
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    let missing = status(&error).is_some_and(|code| code == 404);
                    let text = describe(self.what, &error);
                    if self.optional && missing {
                        debug!(what = self.what, "not installed");
                        Update::Listed(HashMap::new())
                    } else {
                        self.metrics.watch_failed(self.what);
                        if std::mem::replace(&mut failing, true) {
                            debug!(what = self.what, error = text, "still failing");
                        } else {
                            warn!(what = self.what, error = text, "what is known stays; trying again");
                        }
                        continue;
                    }
                }
            };
            if self.sender.send(change(update)).await.is_err() {
                return;
            }
        }
    }
}

fn status(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status.code),
        InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) | NoResourceVersion => None,
    }
}

/// What was tried, why it failed, and what to do.
fn describe(what: &str, error: &watcher::Error) -> String {
    match status(error) {
        Some(403) => format!("{error}; grant our service account the verbs list and watch on {what}"),
        Some(401) => format!("{error}; the API server does not accept our token"),
        _ => error.to_string(),
    }
}

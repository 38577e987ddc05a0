//! One kind of object, listed and watched for ever.
//!
//! `kube`'s watcher resumes at the last version that it saw, and lists again when that is too old
//! for the server.
//!
//! A kind that need not be installed is asked for by discovery: a server, or something before it, that
//! does not find a list says nothing of what is installed.

use std::{collections::HashMap, fmt::Debug, ops::ControlFlow, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, TryStreamExt as _};
use kube::{
    Api, Client, Resource,
    core::{ApiResource, DynamicObject, GroupVersionKind},
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

/// How long until a kind that is not installed is asked for again.
const NOT_INSTALLED: Duration = Duration::from_secs(30);
/// After discovery failed.
const DISCOVERY_PAUSE: Duration = Duration::from_secs(5);

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
    pub metrics: Arc<Metrics>,
    pub sender: mpsc::Sender<C>,
}

impl<C: Send + 'static> Kind<C> {
    /// Follows a kind of `group` that need not be installed, in whichever version the server has it.
    pub(super) async fn follow_optional<T: Send>(
        self,
        client: Client,
        (group, kind): (&'static str, &'static str),
        read: impl Fn(&DynamicObject) -> Option<T> + Send,
        change: fn(Update<T>) -> C,
    ) {
        loop {
            match served(&client, group, kind).await {
                Ok(Some(version)) => {
                    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, &version, kind));
                    let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
                    if self.follow_while_there(api, &read, change).await.is_break() {
                        return;
                    }
                    // Whether it is gone, discovery says.
                    tokio::time::sleep(DISCOVERY_PAUSE).await;
                }
                Ok(None) => {
                    info!(what = self.what, "not installed: there are none");
                    if self.sender.send(change(Update::Listed(HashMap::new()))).await.is_err() {
                        return;
                    }
                    while matches!(served(&client, group, kind).await, Ok(None)) {
                        tokio::time::sleep(NOT_INSTALLED).await;
                    }
                }
                Err(error) => {
                    self.metrics.watch_failed(self.what);
                    warn!(what = self.what, %error, "cannot ask what is installed; trying again");
                    tokio::time::sleep(DISCOVERY_PAUSE).await;
                }
            }
        }
    }

    /// Follows objects of one type, of which `read` keeps what counts.
    pub(super) async fn follow<K, T: Send>(
        self,
        api: Api<K>,
        read: impl Fn(&K) -> Option<T> + Send,
        change: fn(Update<T>) -> C,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        while self.follow_while_there(api.clone(), &read, change).await.is_continue() {
            tokio::time::sleep(DISCOVERY_PAUSE).await;
        }
    }

    /// Until the server does not find it (`Continue`), or nobody listens any more.
    async fn follow_while_there<K, T: Send>(
        &self,
        api: Api<K>,
        read: &(impl Fn(&K) -> Option<T> + Send),
        change: fn(Update<T>) -> C,
    ) -> ControlFlow<()>
    where
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
                Ok(None) => return ControlFlow::Break(()),
                Err(error) => {
                    let text = describe(self.what, &error);
                    self.metrics.watch_failed(self.what);
                    if std::mem::replace(&mut failing, true) {
                        debug!(what = self.what, error = text, "still failing");
                    } else {
                        warn!(what = self.what, error = text, "what is known stays; trying again");
                    }
                    if status(&error) == Some(404) {
                        return ControlFlow::Continue(());
                    }
                    continue;
                }
            };
            if self.sender.send(change(update)).await.is_err() {
                return ControlFlow::Break(());
            }
        }
    }
}

/// The version in which the server has `kind` of `group`, `v1` before others; `None`: in none.
async fn served(client: &Client, group: &str, kind: &str) -> Result<Option<String>, kube::Error> {
    let groups = client.list_api_groups().await?;
    let versions =
        groups.groups.into_iter().filter(|known| known.name == group).flat_map(|known| known.versions);
    let mut versions: Vec<_> = versions.collect();
    versions.sort_by_key(|known| known.version != "v1");
    for known in versions {
        let resources = client.list_api_group_resources(&known.group_version).await?;
        if resources.resources.iter().any(|resource| resource.kind == kind) {
            return Ok(Some(known.version));
        }
    }
    Ok(None)
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

#[cfg(test)]
mod tests;

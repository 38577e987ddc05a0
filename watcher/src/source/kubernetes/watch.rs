//! One kind of object, listed and watched for ever.
//!
//! `kube`'s watcher resumes at the last version that it saw, and lists again when that is too old
//! for the server. Added here: waits that grow while the server is unreachable, a notice when it
//! answers again (a resumed watch without events looks like one that hangs), and a way out of a
//! version that the server will never reach.

use std::{
    fmt::Debug,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::BoxStream};
use kube::{
    Api, Client, Config, Resource,
    client::{Body, ClientBuilder},
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::{sync::watch, time::Instant};
use tracing::debug;

use super::{backoff::Backoff, pace::Pace};

/// How long one watch lasts. A connection that died silently is noticed 5 s after that.
const WATCH_SECS: u32 = 120;
/// How long an answer may take to start; longer than a watch may be silent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(WATCH_SECS as u64 + 10);
/// After refusals to resume for so long the watch starts with a list: the server may have lost its
/// state, and with it the version to resume from.
const RESUME_TIMEOUT: Duration = Duration::from_secs(30);

/// What the API server sent about one kind.
#[derive(Debug)]
pub(super) enum Received<K> {
    /// A list or change.
    Event(Event<K>),
    /// It cannot be watched now, and why.
    Failed(String),
    /// It can be watched again, and nothing was missed.
    Recovered,
}

/// One kind of object, listed and watched for ever.
pub(super) struct Watched<K> {
    /// For messages, such as `pods`.
    what: &'static str,
    api: Api<K>,
    config: watcher::Config,
    stream: BoxStream<'static, watcher::Result<Event<K>>>,
    /// Counts successful answers of the server.
    answers: watch::Receiver<u64>,
    backoff: Backoff,
    wait_until: Option<Instant>,
    failed_at: Option<Instant>,
    refused_since: Option<Instant>,
}

impl<K> Debug for Watched<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched")
            .field("what", &self.what)
            .field("failed_at", &self.failed_at)
            .finish_non_exhaustive()
    }
}

impl<K> Watched<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// `api`: those of all namespaces, or of one. `fields`: which objects, as a field selector.
    ///
    /// # Errors
    /// No client can be created from `config`.
    pub(super) fn new(
        what: &'static str,
        config: &Config,
        api: impl FnOnce(Client) -> Api<K>,
        fields: Option<String>,
    ) -> Result<Self, kube::Error> {
        let (counter, answers) = watch::channel(0);
        let client = ClientBuilder::try_from(super::answering_within(ANSWER_TIMEOUT, config))?
            .with_layer(&Watching { counter: Arc::new(counter), pace: Arc::default() })
            .build();
        let config = watcher::Config {
            field_selector: fields,
            timeout: Some(WATCH_SECS),
            // What a list lacks counts as gone. So it must be as new as the store is: one of several
            // API servers may be behind, and what it remembers does not do. For the same reason no
            // streaming list: `kube` takes any age for it.
            list_semantic: watcher::ListSemantic::MostRecent,
            initial_list_strategy: watcher::InitialListStrategy::ListWatch,
            // A whole list comes from the server's memory, once that is as new as the store
            // (Kubernetes 1.31); pages of one are read from the store.
            page_size: None,
            ..watcher::Config::default()
        };
        let api = api(client);
        let stream = watcher::watcher(api.clone(), config.clone()).boxed();
        Ok(Self {
            what,
            api,
            config,
            stream,
            answers,
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(15)),
            wait_until: None,
            failed_at: None,
            refused_since: None,
        })
    }

    /// The next event or failure. Cancel safe.
    pub(super) async fn next(&mut self) -> Received<K> {
        loop {
            if let Some(until) = self.wait_until {
                tokio::time::sleep_until(until).await;
                self.wait_until = None;
                self.answers.mark_unchanged();
            }
            tokio::select! {
                biased;
                item = self.stream.next() => match item {
                    Some(Ok(event)) => {
                        // The start of a list is sent without an answer of the server.
                        if !matches!(event, Event::Init) {
                            self.backoff.reset();
                            self.refused_since = None;
                            self.failed_at = None;
                        }
                        return Received::Event(event);
                    }
                    Some(Err(error)) => {
                        if let Some(failed) = self.on_error(&error) {
                            return failed;
                        }
                    }
                    None => self.restart(),
                },
                Ok(()) = self.answers.changed(), if self.failed_at.is_some() => {
                    self.failed_at = None;
                    return Received::Recovered;
                }
            }
        }
    }

    /// What has arrived already, without waiting.
    pub(super) fn ready(&mut self) -> Option<Received<K>> {
        if self.wait_until.is_some() { None } else { self.next().now_or_never() }
    }

    /// Starts again, with a list.
    fn restart(&mut self) {
        self.stream = watcher::watcher(self.api.clone(), self.config.clone()).boxed();
        self.refused_since = None;
    }

    /// Decides how to continue. `None`: the failure is expected (an expired version) and not
    /// reported.
    fn on_error(&mut self, error: &watcher::Error) -> Option<Received<K>> {
        let now = Instant::now();
        let pause = self.backoff.next();
        self.wait_until = Some(now + pause);
        debug!(what = self.what, %error, ?pause, "watch interrupted");
        match status(error).map(|status| status.code) {
            Some(410) => {
                self.restart();
                return None;
            }
            Some(_) if matches!(error, watcher::Error::WatchStartFailed(_)) => {
                let since = *self.refused_since.get_or_insert(now);
                if now.duration_since(since) >= RESUME_TIMEOUT {
                    self.restart();
                }
            }
            _ => {}
        }
        self.failed_at = Some(now);
        Some(Received::Failed(describe(self.what, error)))
    }
}

fn status(error: &watcher::Error) -> Option<&kube::core::Status> {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status),
        InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) | NoResourceVersion => None,
    }
}

/// What was tried, why it failed, and what to do.
fn describe(what: &str, error: &watcher::Error) -> String {
    let tried = match error {
        watcher::Error::InitialListFailed(_) | watcher::Error::NoResourceVersion => "list",
        _ => "watch",
    };
    match status(error) {
        Some(status) if status.code == 403 => format!(
            "{tried} {what}: {}; grant the watcher's service account the verb {tried} on {what}, as the chart's roles do",
            status.message
        ),
        Some(status) if status.code == 401 => {
            format!("{tried} {what}: the API server does not accept our credentials: {}", status.message)
        }
        Some(status) => format!("{tried} {what}: {}", status.message),
        None => format!("{tried} {what}: {}", super::cause(error)),
    }
}

/// Counts successful answers, and delays watches that begin too soon.
#[derive(Clone)]
struct Watching {
    counter: Arc<watch::Sender<u64>>,
    pace: Arc<Pace>,
}

impl<S> tower::Layer<S> for Watching {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Observed<S> {
        Observed { inner, watching: self.clone() }
    }
}

struct Observed<S> {
    inner: S,
    watching: Watching,
}

impl<S, B> tower::Service<http::Request<Body>> for Observed<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let Watching { counter, pace } = self.watching.clone();
        let turn = pace.turn_of(request.uri());
        // Nothing is sent before the future is polled.
        let answer = self.inner.call(request);
        Box::pin(async move {
            if let Some(turn) = turn {
                tokio::time::sleep_until(turn).await;
            }
            let answer = answer.await?;
            if answer.status().is_success() {
                counter.send_modify(|count| *count += 1);
            }
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as api;

    use super::*;

    #[test]
    fn a_missing_grant_is_named_by_its_verb() {
        let status = kube::core::Status::failure("pods is forbidden", "Forbidden").with_code(403);
        let error = watcher::Error::InitialListFailed(kube::Error::Api(status.boxed()));
        let text = describe("pods", &error);
        assert!(text.contains("pods is forbidden") && text.contains("the verb list on pods"), "{text}");
    }

    /// An hour of a paused clock; nothing listens at the address.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_away_for_an_hour_gets_fewer_and_fewer_requests_and_no_pod_changes() {
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = Config::new(format!("http://{unused}").parse().unwrap());
        let mut pods = Watched::<api::Pod>::new("pods", &config, Api::all, None).unwrap();
        let (since, mut failures, mut listed) = (Instant::now(), Vec::new(), 0);
        while since.elapsed() < Duration::from_hours(1) {
            match pods.next().await {
                Received::Failed(text) => {
                    assert!(text.starts_with("list pods: "), "{text}");
                    failures.push(since.elapsed());
                }
                Received::Event(Event::Init) => listed += 1,
                received => panic!("{received:?}"),
            }
        }
        assert!(failures[0] < Duration::from_secs(40), "{:?}", failures[0]);
        // The start of a list is no answer: the waits grow although there is one before each
        // failure.
        assert!(listed >= failures.len() && failures.len() < 500, "{} attempts", failures.len());
        let longest = failures.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max().unwrap();
        assert!(longest < Duration::from_mins(1), "its return would go unnoticed for {longest:?}");
    }
}

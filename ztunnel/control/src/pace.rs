//! How soon a watch begins again. One that ends without an error is begun anew at once by `kube`, so
//! that an API server that ends all of them would be asked thousands of times a second.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{Request, Uri};
use kube::client::Body;
use tokio::time::Instant;
use tower::{Layer, Service};

/// Between the beginnings of two watches of one kind.
const PAUSE: Duration = Duration::from_secs(1);

/// A layer of a client, which delays what it asks for too soon.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<Mutex<HashMap<String, Instant>>>);

impl Pace {
    /// When a request for `uri` may be sent. It counts as sent then.
    fn turn_of(&self, uri: &Uri) -> Option<Instant> {
        let mut pairs = uri.query()?.split('&');
        if !pairs.any(|pair| pair.starts_with("watch=")) {
            return None;
        }
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let turn = begun.get(uri.path()).map_or(now, |last| now.max(*last + PAUSE));
        begun.insert(uri.path().to_owned(), turn);
        Some(turn)
    }
}

impl<S> Layer<S> for Pace {
    type Service = Paced<S>;

    fn layer(&self, inner: S) -> Paced<S> {
        Paced { pace: self.clone(), inner }
    }
}

/// A client that begins no watch too soon.
#[derive(Clone, Debug)]
pub struct Paced<S> {
    pace: Pace,
    inner: S,
}

impl<S> Service<Request<Body>> for Paced<S>
where
    S: Service<Request<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let turn = self.pace.turn_of(request.uri());
        // Nothing is sent before the future is polled.
        let answer = self.inner.call(request);
        Box::pin(async move {
            if let Some(turn) = turn {
                tokio::time::sleep_until(turn).await;
            }
            answer.await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_watch_begins_a_second_after_the_last_of_its_kind() {
        let pace = Pace::default();
        let wait = |uri: &'static str| {
            pace.turn_of(&Uri::from_static(uri)).map(|turn| turn.duration_since(Instant::now()))
        };
        assert_eq!(wait("https://api/api/v1/pods?limit=500"), None);
        assert_eq!(wait("https://api/api/v1/pods?watch=true"), Some(Duration::ZERO));
        assert_eq!(wait("https://api/api/v1/nodes?watch=true"), Some(Duration::ZERO));
        tokio::time::advance(PAUSE / 4).await;
        assert_eq!(wait("https://api/api/v1/pods?timeoutSeconds=9&watch=true"), Some(PAUSE * 3 / 4));
        tokio::time::advance(PAUSE * 2).await;
        assert_eq!(wait("https://api/api/v1/pods?watch=true"), Some(Duration::ZERO));
    }
}

//! Answers to scrapes of the metrics. In a large mesh the text has many megabytes: however many ask
//! for it and however slowly they read it, few texts are made, and few are held.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, HeaderValue, Request, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{
    runtime::Handle,
    sync::{Mutex, OnceCell},
};
use tower::ServiceExt;
use tower_http::compression::CompressionLayer;

use super::{off_thread, whole_body};
use crate::metrics::Metrics;

/// A text may be as many times older than it took to make: so making them takes a fifth of a core at
/// most.
const AGE: u32 = 4;
/// Texts that slow clients may hold besides the latest one. Beyond that the latest one is given again.
const HELD: usize = 4;
/// The best first.
const ENCODINGS: [&str; 4] = ["zstd", "br", "gzip", "deflate"];

/// Makes the texts.
pub(super) struct Scrapes {
    metrics: Arc<Metrics>,
    texts: Mutex<Texts>,
}

#[derive(Default)]
struct Texts {
    latest: Option<Arc<Text>>,
    /// Those that were made before and are still being read.
    before: Vec<Weak<Text>>,
}

/// All metrics at one moment.
struct Text {
    began: Instant,
    took: Duration,
    plain: Bytes,
    compressed: [OnceCell<Bytes>; ENCODINGS.len()],
}

impl Scrapes {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, texts: Mutex::default() }
    }

    /// A text that is young enough. Those who ask while one is made share the next one.
    async fn text(&self) -> Result<Arc<Text>, Response> {
        let asked = Instant::now();
        let mut texts = self.texts.lock().await;
        texts.before.retain(|text| text.strong_count() > 0);
        if let Some(latest) = &texts.latest
            && (latest.began >= asked
                || latest.began.elapsed() < latest.took * AGE
                || texts.before.len() >= HELD)
        {
            return Ok(Arc::clone(latest));
        }
        let (metrics, began) = (Arc::clone(&self.metrics), Instant::now());
        let plain = match off_thread(move || metrics.encode()).await? {
            Ok(text) => text.into(),
            Err(error) => return Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()),
        };
        let text = Arc::new(Text { began, took: began.elapsed(), plain, compressed: Default::default() });
        let before = texts.latest.replace(Arc::clone(&text));
        texts.before.extend(before.as_ref().map(Arc::downgrade));
        Ok(text)
    }
}

impl Text {
    /// Compressed as a client takes it: once for all.
    async fn compressed(&self, encoding: usize) -> Result<Bytes, Response> {
        let make = || {
            let (plain, runtime) = (self.plain.clone(), Handle::current());
            off_thread(move || runtime.block_on(compress(plain, ENCODINGS[encoding])))
        };
        self.compressed[encoding].get_or_try_init(make).await.cloned()
    }
}

async fn compress(plain: Bytes, encoding: &'static str) -> Bytes {
    let router = Router::new().route("/", get(async move || plain)).layer(CompressionLayer::new());
    let mut request = Request::new(Body::empty());
    request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static(encoding));
    let Ok(response) = router.oneshot(request).await;
    axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap_or_default()
}

/// The best encoding that the client takes.
fn encoding(headers: &HeaderMap) -> Option<usize> {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let accepted: Vec<(&str, &str)> = values
        .flat_map(|value| value.split(','))
        .map(|item| item.split_once(';').unwrap_or((item, "")))
        .map(|(name, weight)| (name.trim(), weight.trim()))
        .collect();
    let is_accepted = |name: &str| {
        let found = accepted.iter().find(|(accepted, _)| accepted.eq_ignore_ascii_case(name));
        found.is_some_and(|(_, weight)| !["q=0", "q=0.0", "q=0.00", "q=0.000"].contains(weight))
    };
    ENCODINGS.iter().position(|name| is_accepted(name))
}

/// All metrics, in the type and encoding asked for.
pub(super) async fn metrics(State(scrapes): State<Arc<Scrapes>>, headers: HeaderMap) -> Response {
    let accepts = |kind| {
        let mut accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        accepted.any(|value| value.contains(kind))
    };
    let content_type = if accepts("application/openmetrics-text") {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; charset=utf-8"
    };
    let encoding = encoding(&headers);
    let answer = async || {
        let text = scrapes.text().await?;
        let bytes = match encoding {
            Some(encoding) => text.compressed(encoding).await?,
            None => text.plain.clone(),
        };
        Ok::<_, Response>((text, bytes))
    };
    let (text, bytes) = match answer().await {
        Ok(answer) => answer,
        Err(failed) => return failed,
    };
    let mut response = whole_body(bytes, text);
    let sent = response.headers_mut();
    sent.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    sent.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if let Some(encoding) = encoding {
        sent.insert(header::CONTENT_ENCODING, HeaderValue::from_static(ENCODINGS[encoding]));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrapes() -> Arc<Scrapes> {
        Arc::new(Scrapes::new(Arc::default()))
    }

    #[tokio::test]
    async fn however_many_read_slowly_few_texts_are_held() {
        let scrapes = scrapes();
        let mut slow = Vec::new();
        for _ in 0..100 {
            slow.push(metrics(State(Arc::clone(&scrapes)), HeaderMap::new()).await);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let texts = scrapes.texts.lock().await;
        assert!(texts.before.len() <= HELD, "{} texts", texts.before.len());
        drop(texts);
        // Who reads it gives it up.
        drop(slow);
        let began = Instant::now();
        let fresh = loop {
            let text = scrapes.text().await.unwrap();
            if text.began >= began {
                break text;
            }
        };
        let texts = scrapes.texts.lock().await;
        assert!(texts.before.iter().all(|text| text.strong_count() == 0), "somebody still holds one");
        assert!(!fresh.plain.is_empty());
    }

    #[tokio::test]
    async fn who_asks_at_the_same_time_shares_one_text() {
        let scrapes = scrapes();
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let scrapes = Arc::clone(&scrapes);
            asking.spawn(async move { scrapes.text().await.unwrap() });
        }
        let mut different: Vec<Arc<Text>> = Vec::new();
        while let Some(text) = asking.join_next().await {
            let text = text.unwrap();
            if !different.iter().any(|other| Arc::ptr_eq(other, &text)) {
                different.push(text);
            }
        }
        assert!(different.len() <= 3, "{} texts for 50", different.len());
    }

    #[test]
    fn the_best_encoding_that_is_accepted_is_used() {
        let of = |value: &str| {
            let headers = HeaderMap::from_iter([(header::ACCEPT_ENCODING, value.parse().unwrap())]);
            encoding(&headers).map(|encoding| ENCODINGS[encoding])
        };
        assert_eq!(of("gzip, deflate"), Some("gzip"));
        assert_eq!(of("gzip;q=0.5, ZSTD;q=0.1"), Some("zstd"));
        assert_eq!(of("br;q=0, deflate"), Some("deflate"));
        assert_eq!(of("identity"), None);
        assert_eq!(encoding(&HeaderMap::new()), None);
    }
}

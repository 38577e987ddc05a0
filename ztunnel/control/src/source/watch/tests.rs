//! An API server that is away for an hour, in every way in which it can be: nothing that is known ends by
//! its age. The clock is tokio's, which goes on as soon as everybody waits.

use std::{
    convert::Infallible,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use serde_json::json;
use tokio::time::Instant;

use tower::Layer as _;

use super::*;
use crate::pace::Pace;

/// What the API server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answers {
    Well,
    /// Not at all.
    Never,
    Unavailable,
    /// Somebody before it says so, of the list too.
    NotFound,
    /// To begin at another version than it knows, and then nothing.
    Gone,
    /// Half a list.
    Half,
    /// An empty body, and the end of the connection.
    Nothing,
}

const GROUP: &str = "security.istio.io";

struct Server {
    answers: Mutex<Answers>,
    asked: AtomicUsize,
}

impl Server {
    fn answers(&self, answers: Answers) {
        *self.answers.lock().unwrap() = answers;
    }

    async fn answer(&self, request: http::Request<Body>) -> http::Response<Body> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let is_watch = request.uri().query().is_some_and(|query| query.contains("watch="));
        let response = |code: u16, body: String| {
            http::Response::builder().status(code).body(Body::from(body.into_bytes())).unwrap()
        };
        let status = |code: u16, reason: &str| {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
                "code": code, "reason": reason, "message": reason});
            response(code, status.to_string())
        };
        let version = json!({"groupVersion": GROUP.to_owned() + "/v1", "version": "v1"});
        let list = match request.uri().path() {
            "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1",
                "groups": [{"name": GROUP, "versions": [version], "preferredVersion": version}]}),
            "/apis/security.istio.io/v1" => json!({"kind": "APIResourceList", "apiVersion": "v1",
                "groupVersion": version["groupVersion"], "resources": [{"name": "peerauthentications",
                    "singularName": "", "namespaced": true, "kind": "PeerAuthentication", "verbs": ["list"]}]}),
            _ => json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"},
                "items": [{"metadata": {"name": "web", "namespace": "demo"}}]}),
        };
        let answers = *self.answers.lock().unwrap();
        match answers {
            // A watch without an event, until its time is over.
            Answers::Well if is_watch => {
                tokio::time::sleep(WATCH).await;
                response(200, String::new())
            }
            Answers::Well => response(200, list.to_string()),
            Answers::Never => std::future::pending().await,
            Answers::Unavailable => status(503, "ServiceUnavailable"),
            Answers::NotFound => status(404, "NotFound"),
            Answers::Gone if is_watch => status(410, "Expired"),
            Answers::Gone => status(500, "InternalError"),
            Answers::Half => {
                let mut half = list.to_string();
                half.truncate(half.len() / 2);
                response(200, half)
            }
            Answers::Nothing => response(200, String::new()),
        }
    }
}

fn server() -> (Arc<Server>, Client) {
    let server = Arc::new(Server { answers: Mutex::new(Answers::Well), asked: AtomicUsize::new(0) });
    let answering = Arc::clone(&server);
    let service = tower::service_fn(move |request| {
        let server = Arc::clone(&answering);
        // As the real client does: whoever does not answer is given up after some time.
        async move {
            let answered = tokio::time::timeout(WATCH + Duration::from_mins(1), server.answer(request)).await;
            Ok::<_, Infallible>(
                answered
                    .unwrap_or_else(|_| http::Response::builder().status(504).body(Body::empty()).unwrap()),
            )
        }
    });
    (server, Client::new(Pace::default().layer(service), "default"))
}

fn kind(sender: mpsc::Sender<Update<()>>) -> Kind<Update<()>> {
    Kind { what: "pods", metrics: Arc::default(), sender }
}

const AWAY: [Answers; 6] =
    [Answers::Never, Answers::Unavailable, Answers::NotFound, Answers::Gone, Answers::Half, Answers::Nothing];

/// Whether an update says that there is the one object.
fn is_whole(update: &Update<()>) -> bool {
    matches!(update, Update::Listed(all) if all.len() == 1)
}

/// Nothing but what is already known is said in an hour, and soon afterwards everything again.
async fn stays_known_for_an_hour(server: &Server, mut updates: mpsc::Receiver<Update<()>>) {
    let first = updates.recv().await.unwrap();
    assert!(is_whole(&first), "{first:?}");
    for away in AWAY {
        // In the middle of a watch.
        tokio::time::sleep(Duration::from_secs(50)).await;
        server.answers(away);
        let (began, asked) = (Instant::now(), server.asked.load(Ordering::Relaxed));
        let said = tokio::time::timeout(Duration::from_hours(1), updates.recv()).await;
        assert!(said.is_err(), "{away:?}: {said:?} after {:?}", began.elapsed());
        let asked = server.asked.load(Ordering::Relaxed) - asked;
        // Each kind of object, once a second at most.
        assert!((10..=3700).contains(&asked), "{away:?}: asked {asked} times");
        server.answers(Answers::Well);
        // What a watch missed is listed. One that could go on has missed nothing.
        let said = tokio::time::timeout(Duration::from_mins(5), updates.recv()).await;
        assert!(
            said.as_ref().is_ok_and(|said| said.as_ref().is_some_and(is_whole)) || said.is_err(),
            "{said:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_ends_while_the_api_server_is_away_for_an_hour() {
    let (server, client) = server();
    let (sender, updates) = mpsc::channel(16);
    let pods: Api<Pod> = Api::all(client);
    let following = kind(sender).follow(pods, |_: &Pod| Some(()), |update| update);
    tokio::select! {
        () = following => panic!("it does not go on"),
        () = stays_known_for_an_hour(&server, updates) => {}
    }
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_installed_stays_known_as_well() {
    let (server, client) = server();
    let (sender, updates) = mpsc::channel(16);
    let wanted = (GROUP, "PeerAuthentication");
    let following = kind(sender).follow_optional(client, wanted, |_| Some(()), |update| update);
    tokio::select! {
        () = following => panic!("it does not go on"),
        () = stays_known_for_an_hour(&server, updates) => {}
    }
}

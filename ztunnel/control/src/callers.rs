//! Who calls, by the token of the call. The API server judges it.

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use serde::Deserialize;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Code, metadata::MetadataMap};
use ztunnel_api::names::ServiceAccount;

/// The audience of tokens for a mesh's control plane, as Istio's tunnel has them.
pub const AUDIENCE: &str = "istio-ca";

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// Reviews at a time, so that whoever calls us often does not call the API server as often.
const AT_ONCE: usize = 64;
const LIMIT: Duration = Duration::from_secs(10);

/// A tunnel that proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its service account.
    pub account: ServiceAccount,
    /// The node that it runs on.
    pub node: String,
}

/// Why a caller is turned away.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// The call has no token.
    #[error("the call has no token: expected `authorization: Bearer TOKEN`")]
    NoToken,
    /// The API server does not accept it.
    #[error("the token is not valid for the audience {AUDIENCE}: {reason}")]
    Refused {
        /// What the API server said.
        reason: String,
    },
    /// It is nobody's who may call.
    #[error("{user} is none of the service accounts of tunnels: {expected}")]
    NotATunnel {
        /// Whose token it is.
        user: String,
        /// Who may call.
        expected: String,
    },
    /// It is not known where the caller runs.
    #[error("the token of {account} is bound to no pod and no node; mount it as a projected volume")]
    NoNode {
        /// Whose token it is.
        account: ServiceAccount,
    },
    /// The API server cannot be asked.
    #[error("cannot ask the API server {question}")]
    Unavailable {
        /// What was asked.
        question: &'static str,
        /// The cause.
        source: Option<Box<kube::Error>>,
    },
}

impl CallerError {
    /// For metrics: a closed set.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::Refused { .. } => "token_refused",
            Self::NotATunnel { .. } => "not_a_tunnel",
            Self::NoNode { .. } => "no_node",
            Self::Unavailable { .. } => "api_unavailable",
        }
    }

    /// Whether the log has it. What anybody can cause who reaches the port is only counted: it would
    /// fill the log.
    #[must_use]
    pub fn is_notable(&self) -> bool {
        matches!(self, Self::NoNode { .. })
    }

    /// For the caller.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NoToken | Self::Refused { .. } => Code::Unauthenticated,
            Self::NotATunnel { .. } | Self::NoNode { .. } => Code::PermissionDenied,
            Self::Unavailable { .. } => Code::Unavailable,
        }
    }
}

/// Asks the API server about tokens.
#[derive(Clone)]
pub struct Callers {
    client: Client,
    tunnels: Arc<BTreeSet<ServiceAccount>>,
    places: Arc<Semaphore>,
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callers").field("tunnels", &self.tunnels).finish_non_exhaustive()
    }
}

impl Callers {
    /// Only `tunnels` may call.
    #[must_use]
    pub fn new(client: Client, tunnels: BTreeSet<ServiceAccount>) -> Self {
        Self { client, tunnels: Arc::new(tunnels), places: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// The tunnel whose token is in `metadata`.
    ///
    /// # Errors
    /// There is none, it is not a tunnel's, or the API server cannot be asked.
    pub async fn review(&self, metadata: &MetadataMap) -> Result<Caller, CallerError> {
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|value| value.strip_prefix("Bearer ")).ok_or(CallerError::NoToken)?;
        let review = async {
            let _place = self.places.acquire().await.ok()?;
            Some(self.review_token(token.trim()).await)
        };
        // Whoever reaches the port would have the API server asked otherwise, as often as it calls.
        match claimed_account(token.trim()) {
            Some(account) if self.tunnels.contains(&account) => {}
            Some(account) => return Err(self.not_a_tunnel(account.to_string())),
            None => {
                let reason = "it is no token of a service account".to_owned();
                return Err(CallerError::Refused { reason });
            }
        }
        let question = "about a token";
        match timeout(LIMIT, review).await {
            Ok(Some(reviewed)) => reviewed,
            Ok(None) | Err(_) => Err(CallerError::Unavailable { question, source: None }),
        }
    }

    fn not_a_tunnel(&self, user: String) -> CallerError {
        let expected: Vec<String> = self.tunnels.iter().map(ToString::to_string).collect();
        CallerError::NotATunnel { user, expected: expected.join(", ") }
    }

    async fn review_token(&self, token: &str) -> Result<Caller, CallerError> {
        let spec =
            TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token.to_owned()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let reviewed = api.create(&PostParams::default(), &review).await;
        let reviewed = reviewed.map_err(unavailable("about a token"))?;
        let claims = Claims::of(reviewed.status.unwrap_or_default())?;
        if !self.tunnels.contains(&claims.account) {
            return Err(self.not_a_tunnel(claims.account.to_string()));
        }
        let node = match claims.node {
            Some(node) => node,
            None => self.node_of(&claims).await?,
        };
        Ok(Caller { account: claims.account, node })
    }

    /// Where the token does not say it: servers before Kubernetes 1.30.
    async fn node_of(&self, claims: &Claims) -> Result<String, CallerError> {
        let no_node = || CallerError::NoNode { account: claims.account.clone() };
        let (name, uid) = claims.pod.as_ref().ok_or_else(no_node)?;
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &claims.account.namespace);
        let pod = api.get_opt(name).await.map_err(unavailable("for the pod of a token"))?;
        let pod = pod.filter(|pod| pod.metadata.uid.as_ref() == Some(uid)).ok_or_else(no_node)?;
        pod.spec.and_then(|spec| spec.node_name).ok_or_else(no_node)
    }
}

/// Whose token it says to be (RFC 7519, claim `sub`). Nothing of it is proven.
#[must_use]
pub fn claimed_account(token: &str) -> Option<ServiceAccount> {
    #[derive(Deserialize)]
    struct Payload {
        sub: String,
    }
    // Header, claims and signature (RFC 7515, section 7.1), and nothing after them.
    let (head, _signature) = token.rsplit_once('.')?;
    let (_header, payload) = head.split_once('.')?;
    let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
    account_of(&serde_json::from_slice::<Payload>(&payload).ok()?.sub)
}

/// Of a user's name at the API server.
fn account_of(user: &str) -> Option<ServiceAccount> {
    let (namespace, name) = user.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    Some(ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
}

fn unavailable(question: &'static str) -> impl Fn(kube::Error) -> CallerError {
    move |source| CallerError::Unavailable { question, source: Some(Box::new(source)) }
}

/// What an accepted token says.
#[derive(Debug, PartialEq, Eq)]
struct Claims {
    account: ServiceAccount,
    node: Option<String>,
    /// Name and uid.
    pod: Option<(String, String)>,
}

impl Claims {
    fn of(status: TokenReviewStatus) -> Result<Self, CallerError> {
        let refused = |reason: &str| CallerError::Refused { reason: reason.to_owned() };
        if status.authenticated != Some(true) {
            return Err(refused(status.error.as_deref().unwrap_or("the API server does not accept it")));
        }
        // A server that knows nothing of audiences accepts any token, and names none here.
        if !status.audiences.iter().flatten().any(|audience| audience == AUDIENCE) {
            return Err(refused("the API server did not check its audience"));
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        let Some(account) = account_of(&name) else {
            let expected = "a service account".to_owned();
            return Err(CallerError::NotATunnel { user: name, expected });
        };
        let extra = user.extra.unwrap_or_default();
        let claim = |key: &str| match extra.get(key).map(Vec::as_slice) {
            Some([only]) if !only.is_empty() => Some(only.clone()),
            _ => None,
        };
        Ok(Self { account, node: claim(NODE_NAME), pod: claim(POD_NAME).zip(claim(POD_UID)) })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn claims(status: Value) -> Result<Claims, &'static str> {
        Claims::of(serde_json::from_value(status).unwrap()).map_err(|error| error.reason())
    }

    #[test]
    fn a_token_says_whose_it_is_and_where() {
        let user = json!({"username": "system:serviceaccount:adit-system:ztunnel", "extra": {
            NODE_NAME: ["a"], POD_NAME: ["ztunnel-x"], POD_UID: ["u"]}});
        let read = claims(json!({"authenticated": true, "audiences": ["istio-ca"], "user": user})).unwrap();
        assert_eq!(read.account, "adit-system/ztunnel".parse().unwrap());
        assert_eq!((read.node.as_deref(), read.pod), (Some("a"), Some(("ztunnel-x".into(), "u".into()))));
    }

    #[test]
    fn a_token_that_was_not_checked_is_refused() {
        let account = json!({"username": "system:serviceaccount:a:b"});
        for (status, reason) in [
            (json!({"authenticated": false, "audiences": ["istio-ca"], "user": account}), "token_refused"),
            (json!({"authenticated": true, "user": account}), "token_refused"),
            (json!({"authenticated": true, "audiences": ["api"], "user": account}), "token_refused"),
            (
                json!({"authenticated": true, "audiences": ["istio-ca"], "user": {"username": "admin"}}),
                "not_a_tunnel",
            ),
            (json!({}), "token_refused"),
        ] {
            assert_eq!(claims(status.clone()), Err(reason), "{status}");
        }
    }

    #[test]
    fn a_token_that_is_nobodys_is_known_without_a_review() {
        let token = |payload: &str| format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(payload));
        let of = |payload| claimed_account(&token(payload)).map(|account| account.to_string());
        assert_eq!(of(r#"{"sub": "system:serviceaccount:a:b", "aud": ["x"]}"#), Some("a/b".to_owned()));
        for payload in [r#"{"sub": "admin"}"#, r#"{"sub": 1}"#, "{}", "", "[]"] {
            assert_eq!(of(payload), None, "{payload}");
        }
        let four_parts = token(r#"{"sub": "system:serviceaccount:a:b"}"#) + ".more";
        for text in ["", ".", "a.b", "a.%%.c", &four_parts] {
            assert_eq!(claimed_account(text), None, "{text}");
        }
    }
}

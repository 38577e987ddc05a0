//! The Secret that holds the root. Whoever finds none makes it; of several at the same time one
//! succeeds, and the others use its root.

use std::{collections::BTreeMap, time::Duration};

use backon::{ExponentialBuilder, Retryable as _};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tracing::{info, warn};

use super::{Authority, AuthorityError, new_root};

/// As in any Secret of type `kubernetes.io/tls`, also cert-manager's.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// Where the certificate is not the root itself.
const ROOT: &str = "ca.crt";
/// The key that Istio's tunnels expect in their ConfigMap.
const PUBLISHED: &str = "root-cert.pem";
const MANAGER: &str = "ztunnel-control";

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The API server refuses, or is away.
    #[error("cannot {verb} {object}")]
    Api {
        /// What was tried.
        verb: &'static str,
        /// On what, with its namespace.
        object: String,
        /// The cause.
        source: Box<kube::Error>,
    },
    /// What the Secret holds.
    #[error("Secret {secret} has no usable root: fix it, or delete it to have a new root made")]
    Unusable {
        /// Namespace and name.
        secret: String,
        /// The cause.
        source: AuthorityError,
    },
    /// The Secret lacks a part.
    #[error(
        "Secret {secret} has no text under {key}: expected certificate and key in PEM under tls.crt and tls.key"
    )]
    Incomplete {
        /// Namespace and name.
        secret: String,
        /// Which part.
        key: &'static str,
    },
    /// A new root cannot be made.
    #[error("cannot make a new root")]
    New(#[source] AuthorityError),
}

impl RootError {
    /// Whether another attempt may succeed: the server is away, or busy.
    fn is_passing(&self) -> bool {
        match self {
            Self::Api { source, .. } => match &**source {
                kube::Error::Api(status) => status.code == 429 || status.code >= 500,
                _ => true,
            },
            Self::Unusable { .. } | Self::Incomplete { .. } | Self::New(_) => false,
        }
    }
}

/// Where the root is, and where it is published.
#[derive(Clone, Debug)]
pub struct RootPlace {
    /// The namespace of both.
    pub namespace: String,
    /// The Secret.
    pub secret: String,
    /// The ConfigMap from which tunnels learn the root; `None`: nobody does.
    pub config_map: Option<String>,
    /// For the name of a new root.
    pub trust_domain: String,
}

impl RootPlace {
    /// The root, which is made if there is none. Waits for an API server that is away.
    ///
    /// # Errors
    /// It refuses, or the root cannot be used.
    pub async fn open(&self, client: &Client) -> Result<Authority, RootError> {
        let waits = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(15))
            .with_jitter()
            .without_max_times();
        let noted = |error: &RootError, pause: Duration| {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            warn!(%error, cause, retry_ms = pause.as_millis(), "waiting for the API server");
        };
        (|| self.attempt(client)).retry(waits).when(RootError::is_passing).notify(noted).await
    }

    async fn attempt(&self, client: &Client) -> Result<Authority, RootError> {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &self.namespace);
        let name = format!("{}/{}", self.namespace, self.secret);
        let error = |verb, object: &str| {
            let object = object.to_owned();
            move |source: kube::Error| RootError::Api { verb, object, source: Box::new(source) }
        };
        let object = format!("Secret {name}");
        let secret = match secrets.get_opt(&self.secret).await.map_err(error("read", &object))? {
            Some(secret) => secret,
            None => match secrets.create(&PostParams::default(), &self.new_secret()?).await {
                Ok(secret) => {
                    info!(secret = name, "root made");
                    secret
                }
                Err(kube::Error::Api(status)) if status.is_already_exists() => {
                    secrets.get(&self.secret).await.map_err(error("read", &object))?
                }
                Err(source) => return Err(error("create", &object)(source)),
            },
        };
        let authority = from_secret(&name, &secret)?;
        if let Some(map) = &self.config_map {
            let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &self.namespace);
            let published = ConfigMap {
                metadata: ObjectMeta { name: Some(map.clone()), ..ObjectMeta::default() },
                data: Some([(PUBLISHED.to_owned(), authority.root().to_owned())].into()),
                ..ConfigMap::default()
            };
            let object = format!("ConfigMap {}/{map}", self.namespace);
            let params = PatchParams::apply(MANAGER).force();
            maps.patch(map, &params, &Patch::Apply(&published)).await.map_err(error("apply", &object))?;
        }
        Ok(authority)
    }

    fn new_secret(&self) -> Result<Secret, RootError> {
        let (certificate, key) = new_root(&self.trust_domain).map_err(RootError::New)?;
        let data = [(CERTIFICATE, certificate), (KEY, key)];
        let data: BTreeMap<String, ByteString> =
            data.into_iter().map(|(name, text)| (name.to_owned(), ByteString(text.into_bytes()))).collect();
        Ok(Secret {
            metadata: ObjectMeta { name: Some(self.secret.clone()), ..ObjectMeta::default() },
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data),
            ..Secret::default()
        })
    }
}

fn from_secret(name: &str, secret: &Secret) -> Result<Authority, RootError> {
    let text = |key: &str| {
        let bytes = secret.data.as_ref()?.get(key)?;
        std::str::from_utf8(&bytes.0).ok().filter(|text| !text.is_empty())
    };
    let incomplete = |key| RootError::Incomplete { secret: name.to_owned(), key };
    let certificate = text(CERTIFICATE).ok_or_else(|| incomplete(CERTIFICATE))?;
    let key = text(KEY).ok_or_else(|| incomplete(KEY))?;
    Authority::from_pem(certificate, key, text(ROOT))
        .map_err(|source| RootError::Unusable { secret: name.to_owned(), source })
}

//! The Secret of the root, and the ConfigMap with its public part, at the API server. Whoever finds
//! no Secret makes it; of several at the same time one succeeds, and the others use its root.

use std::time::Duration;

use backon::{ExponentialBuilder, Retryable as _};
use error_reporter::Report;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tracing::{info, warn};

use super::{
    Authority, AuthorityError,
    secret::{self, RootSecret, SecretError},
};

/// The keys that Istio's tunnels expect in their ConfigMaps.
const PUBLISHED: &str = "root-cert.pem";
const REVOKED: &str = "ca-crl.pem";
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
        source: SecretError,
    },
    /// A new root cannot be made.
    #[error("cannot make a new root")]
    New(#[source] AuthorityError),
}

impl RootError {
    /// Whether the API server refuses for good; anything else may pass.
    fn is_final(&self) -> bool {
        match self {
            Self::Api { source, .. } => {
                matches!(&**source, kube::Error::Api(status) if status.code < 500 && status.code != 429)
            }
            Self::New(_) => true,
            Self::Unusable { .. } => false,
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
    /// The ConfigMap from which tunnels learn the root.
    pub config_map: String,
    /// The ConfigMap with the list of revoked certificates; `None`: there is none.
    pub crl_config_map: Option<String>,
    /// For the name of a new root.
    pub trust_domain: String,
}

impl RootPlace {
    /// Namespace and name of the Secret.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.secret)
    }

    pub(super) fn secrets(&self, client: &Client) -> Api<Secret> {
        Api::namespaced(client.clone(), &self.namespace)
    }

    /// The root, which is made if there is none, and published. Waits for an API server that is away, and for a
    /// Secret that cannot be used to be mended.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn open(&self, client: &Client) -> Result<(Secret, RootSecret), RootError> {
        let waits = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(15))
            .with_jitter()
            .without_max_times();
        let noted = |error: &RootError, pause: Duration| {
            let error = Report::new(error);
            warn!(%error, retry_ms = pause.as_millis(), "there is no root yet; trying again");
        };
        (|| self.open_once(client)).retry(waits).when(|error| !error.is_final()).notify(noted).await
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// The API server is away or refuses, or the Secret cannot be used.
    pub async fn open_once(&self, client: &Client) -> Result<(Secret, RootSecret), RootError> {
        let secret = if let Some(secret) = self.read(client).await? {
            secret
        } else {
            let new = secret::made(&self.secret, &self.trust_domain).map_err(RootError::New)?;
            if let Some(secret) = self.create(client, &new).await? {
                info!(secret = self.name(), "root made");
                secret
            } else {
                let read = self.secrets(client).get(&self.secret).await;
                read.map_err(|source| self.failed("read", source))?
            }
        };
        let read = RootSecret::read(&secret)
            .map_err(|source| RootError::Unusable { secret: self.name(), source })?;
        self.publish(client, &read.authority).await?;
        Ok((secret, read))
    }

    /// The Secret, if there is one.
    ///
    /// # Errors
    /// The API server is away, or refuses.
    pub async fn read(&self, client: &Client) -> Result<Option<Secret>, RootError> {
        self.secrets(client).get_opt(&self.secret).await.map_err(|source| self.failed("read", source))
    }

    /// Makes the Secret. `None`: there is one by now.
    ///
    /// # Errors
    /// The API server is away, or refuses.
    pub async fn create(&self, client: &Client, secret: &Secret) -> Result<Option<Secret>, RootError> {
        match self.secrets(client).create(&PostParams::default(), secret).await {
            Ok(created) => Ok(Some(created)),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(None),
            Err(source) => Err(self.failed("create", source)),
        }
    }

    /// Writes the Secret, unless it was changed since it was read. `None`: it was.
    ///
    /// # Errors
    /// The API server is away, or refuses.
    pub async fn replace(&self, client: &Client, secret: &Secret) -> Result<Option<Secret>, RootError> {
        match self.secrets(client).replace(&self.secret, &PostParams::default(), secret).await {
            Ok(replaced) => Ok(Some(replaced)),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(None),
            Err(source) => Err(self.failed("update", source)),
        }
    }

    /// Writes what tunnels are to trust into the ConfigMap.
    ///
    /// # Errors
    /// The API server is away, or refuses.
    pub async fn publish(&self, client: &Client, authority: &Authority) -> Result<(), RootError> {
        self.apply(client, &self.config_map, PUBLISHED, authority.trusted_pem()).await
    }

    /// The lists of revoked certificates that `map` has.
    pub(super) async fn revocations(&self, client: &Client, map: &str) -> Result<String, RootError> {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &self.namespace);
        let found = maps.get_opt(map).await.map_err(|source| self.map_failed("read", map, source))?;
        Ok(found.and_then(|map| map.data?.remove(REVOKED)).unwrap_or_default())
    }

    /// Writes the lists of revoked certificates.
    pub(super) async fn publish_revocations(
        &self,
        client: &Client,
        map: &str,
        lists: String,
    ) -> Result<(), RootError> {
        self.apply(client, map, REVOKED, lists).await
    }

    async fn apply(&self, client: &Client, map: &str, key: &str, text: String) -> Result<(), RootError> {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &self.namespace);
        let published = ConfigMap {
            metadata: ObjectMeta { name: Some(map.to_owned()), ..ObjectMeta::default() },
            data: Some([(key.to_owned(), text)].into()),
            ..ConfigMap::default()
        };
        let params = PatchParams::apply(MANAGER).force();
        let applied = maps.patch(map, &params, &Patch::Apply(&published)).await;
        applied.map(drop).map_err(|source| self.map_failed("apply", map, source))
    }

    fn map_failed(&self, verb: &'static str, map: &str, source: kube::Error) -> RootError {
        let object = format!("ConfigMap {}/{map}", self.namespace);
        RootError::Api { verb, object, source: Box::new(source) }
    }

    fn failed(&self, verb: &'static str, source: kube::Error) -> RootError {
        RootError::Api { verb, object: format!("Secret {}", self.name()), source: Box::new(source) }
    }
}

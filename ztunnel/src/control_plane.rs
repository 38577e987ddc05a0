//! Connects to a control plane, for certificates and discovery. The TLS root is read again when it
//! changes. The server's certificate may have any of the configured names. Calls carry our token,
//! if there is one.

use std::{
    io,
    path::Path,
    str::FromStr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tonic::{
    Request,
    metadata::{Ascii, MetadataKey, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Uri},
};

use tracing::warn;

use crate::config::{ControlPlaneAddress, ControlPlaneConfig, RootSource, Token};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// The system's root bundle in Debian, Fedora, Alpine and the BSDs.
const SYSTEM_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Why no connection can be made.
#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    /// A file cannot be read.
    #[error("cannot read {what} of the control plane from {path}")]
    Read {
        /// What it holds.
        what: &'static str,
        /// The file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The address or the root is not usable.
    #[error("{address} cannot be used as the control plane's address")]
    Endpoint {
        /// The address.
        address: String,
        /// The cause.
        source: tonic::transport::Error,
    },
    /// The address has no host.
    #[error("the control plane's address {address} has no host")]
    NoHost {
        /// The address.
        address: String,
    },
    /// A header that HTTP does not allow.
    #[error("{what} cannot be sent: it must be visible ASCII")]
    NotAscii {
        /// The header.
        what: &'static str,
    },
}

/// A control plane and its channels.
pub(crate) struct ControlPlane {
    config: ControlPlaneConfig,
    /// As it is shown.
    address: String,
    /// Whether the log says that there is no token.
    told_no_token: AtomicBool,
    /// Rebuilt when the root file changes.
    channels: Mutex<Option<Connected>>,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane").field("config", &self.config).finish_non_exhaustive()
    }
}

struct Connected {
    /// `None` without TLS.
    root: Option<String>,
    /// One per allowed server name, all connected lazily.
    channels: Vec<Channel>,
}

impl ControlPlane {
    /// Connects on first use.
    pub(crate) fn new(config: ControlPlaneConfig) -> Self {
        let address = config.address.to_string();
        Self { config, address, told_no_token: AtomicBool::new(false), channels: Mutex::default() }
    }

    /// The address, for logs.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// One per allowed server name, to be tried in this order.
    pub(crate) fn channels(&self) -> Result<Vec<Channel>, ControlPlaneError> {
        let root = match &self.config.address {
            ControlPlaneAddress::Https(_) => Some(root_pem(&self.config.root)?),
            ControlPlaneAddress::Socket(_) => None,
        };
        let mut held = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connected) = &*held
            && connected.root == root
        {
            return Ok(connected.channels.clone());
        }
        let channels = match &root {
            None => vec![self.channel(None)?],
            Some(root) => {
                let host = Uri::from_str(&self.address).ok().and_then(|uri| uri.host().map(str::to_owned));
                let host = host.ok_or_else(|| ControlPlaneError::NoHost { address: self.address.clone() })?;
                let tls = |name| {
                    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name(name)
                };
                let names = [Some(host), self.config.alt_name.clone()].into_iter().flatten();
                names.map(|name| self.channel(Some(tls(name)))).collect::<Result<Vec<_>, _>>()?
            }
        };
        *held = Some(Connected { root, channels: channels.clone() });
        Ok(channels)
    }

    fn channel(&self, tls: Option<ClientTlsConfig>) -> Result<Channel, ControlPlaneError> {
        let endpoint = Endpoint::from_shared(self.address.clone());
        let endpoint = match tls {
            Some(tls) => endpoint.and_then(|endpoint| endpoint.tls_config(tls)),
            None => endpoint,
        };
        let endpoint = endpoint
            .map_err(|source| ControlPlaneError::Endpoint { address: self.address.clone(), source })?;
        Ok(endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_lazy())
    }

    /// The token, which is read at each call, because the kubelet rotates it. `None` while there is
    /// no file: the service may ask for none, and says so itself if it does.
    fn token(&self) -> Result<Option<String>, ControlPlaneError> {
        let path = match &self.config.token {
            Token::Literal(token) => return Ok(Some(token.clone())),
            Token::File(path) => path,
        };
        match read("the token", path) {
            Err(ControlPlaneError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                if !self.told_no_token.swap(true, Ordering::Relaxed) {
                    warn!(address = self.address, path = %path.display(),
                        "there is no file with a token; calls carry none until there is");
                }
                Ok(None)
            }
            token => token.map(Some),
        }
    }

    /// Adds our credentials.
    pub(crate) fn authenticate<T>(&self, call: &mut Request<T>) -> Result<(), ControlPlaneError> {
        let token = self.token()?;
        let metadata = call.metadata_mut();
        if let Some(token) = token {
            metadata.insert("authorization", ascii("the token", &format!("Bearer {}", token.trim()))?);
        }
        metadata.insert("clusterid", ascii("the cluster's id", &self.config.cluster_id)?);
        for (name, value) in &self.config.headers.0 {
            let what = "an extra header";
            let key = MetadataKey::<Ascii>::from_str(&name.to_lowercase())
                .map_err(|_| ControlPlaneError::NotAscii { what })?;
            metadata.insert(key, ascii(what, value)?);
        }
        Ok(())
    }
}

fn ascii(what: &'static str, text: &str) -> Result<MetadataValue<Ascii>, ControlPlaneError> {
    text.parse().map_err(|_| ControlPlaneError::NotAscii { what })
}

fn root_pem(source: &RootSource) -> Result<String, ControlPlaneError> {
    let what = "the root";
    match source {
        RootSource::Pem(pem) => Ok(pem.clone()),
        RootSource::File(path) => read(what, path),
        RootSource::System => {
            let found = SYSTEM_BUNDLES.iter().find(|path| Path::new(path).exists());
            read(what, Path::new(found.unwrap_or(&SYSTEM_BUNDLES[0])))
        }
    }
}

fn read(what: &'static str, path: &Path) -> Result<String, ControlPlaneError> {
    std::fs::read_to_string(path).map_err(|source| ControlPlaneError::Read {
        what,
        path: path.display().to_string(),
        source,
    })
}

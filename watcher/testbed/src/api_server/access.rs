//! Who may use the API server: kubeconfigs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::api::{authentication::v1::TokenRequest, core::v1::ServiceAccount};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use super::{ApiServer, keys};
use crate::cryptography;

impl ApiServer {
    /// A client by a kubeconfig, which must be used with [`Self::block_on`].
    pub fn client_by(&self, kubeconfig: &Path) -> Client {
        self.block_on(client(kubeconfig))
    }

    /// A kubeconfig of the service account `namespace/name`, with a token as pods get it.
    pub fn kubeconfig_of(&self, namespace: &str, name: &str) -> PathBuf {
        self.kubeconfig_of_pod(namespace, name, None)
    }

    /// The same, with a token that is bound to a pod of that namespace, as those are that pods
    /// mount.
    pub fn kubeconfig_of_pod(&self, namespace: &str, name: &str, pod: Option<(&str, &str)>) -> PathBuf {
        let api: Api<ServiceAccount> = Api::namespaced(self.client(), namespace);
        let bound =
            pod.map(|(name, uid)| json!({"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid}));
        let request = json!({"spec": {"audiences": [], "boundObjectRef": bound}});
        let request: TokenRequest = serde_json::from_value(request).expect("a token request");
        let made = self.wait("a token", || async {
            api.create_token_request(name, &PostParams::default(), &request).await.ok()
        });
        let path = self
            .dir
            .path()
            .join(format!("{namespace}-{name}-{}.kubeconfig", pod.map_or("", |(name, _)| name)));
        let token = made.status.expect("a token").token;
        write_kubeconfig(&path, self.dir.path(), &self.url(), &json!({"token": token}));
        path
    }

    /// A token like `token`, with other claims, signed by the API server's own key.
    pub fn forge(&self, token: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut claims = keys::claims(token);
        change(&mut claims);
        keys::token(self.dir.path(), &claims)
    }

    /// The kubeconfig of the chart's service account, with the chart's rights and no others.
    pub fn watcher_kubeconfig(&self) -> PathBuf {
        self.kubeconfig_of("adit-system", "adit-watcher")
    }

    /// The administrator's kubeconfig.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.dir.path().join("admin.kubeconfig")
    }

    /// A kubeconfig of user `common_name` of `organisation`, by a certificate, which is a server's
    /// of these `names` too. Beside it are `FILE.crt` and `FILE.key`.
    pub fn kubeconfig_of_user(
        &self,
        file: &str,
        organisation: &str,
        common_name: &str,
        names: &[&str],
    ) -> PathBuf {
        self.keys.sign(file, Some(organisation), common_name, names);
        let path = self.file(&format!("{file}.kubeconfig"));
        let user = json!({"client-certificate": self.file(&format!("{file}.crt")),
            "client-key": self.file(&format!("{file}.key"))});
        write_kubeconfig(&path, self.dir.path(), &self.url(), &user);
        path
    }
}

/// A kubeconfig for the API server at `url`, whose CA is in `dir`.
pub(super) fn write_kubeconfig(path: &Path, dir: &Path, url: &str, user: &Value) {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "testbed",
        "clusters": [{"name": "testbed", "cluster": {
            "server": url, "certificate-authority": dir.join("ca.crt")}}],
        "users": [{"name": "testbed", "user": user}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": "testbed"}}],
    });
    fs::write(path, config.to_string()).expect("kubeconfig");
}

/// A client by a kubeconfig.
pub(super) async fn client(kubeconfig: &Path) -> Client {
    cryptography::choose();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("kubeconfig");
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    Client::try_from(config.expect("configuration")).expect("client")
}

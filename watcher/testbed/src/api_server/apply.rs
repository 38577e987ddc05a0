//! Objects as they are written in a manifest: applied, or only checked.

use kube::{
    Api,
    api::{DynamicObject, Patch, PatchParams},
    core::{ApiResource, GroupVersionKind},
};
use serde_json::Value;

use super::ApiServer;
use crate::chart;

impl ApiServer {
    /// Applies every object of `manifest`, as `kubectl apply` would.
    ///
    /// # Panics
    /// When the server refuses one.
    pub fn apply(&self, manifest: &str) {
        for object in chart::objects(manifest) {
            self.try_apply(&object, &PatchParams::apply("test").force()).expect("applied");
        }
    }

    /// What the server would say to `object`, which stays unapplied: the error that names a field
    /// that there is not, or a value that it may not have.
    ///
    /// # Errors
    /// The server refuses it.
    pub fn check(&self, object: &Value) -> Result<(), kube::Error> {
        self.try_apply(object, &PatchParams::apply("test").dry_run().validation_strict())
    }

    fn try_apply(&self, object: &Value, params: &PatchParams) -> Result<(), kube::Error> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (group, version) =
            text("/apiVersion").split_once('/').unwrap_or_else(|| ("", text("/apiVersion")));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("/kind")));
        let api: Api<DynamicObject> = match text("/metadata/namespace") {
            "" => Api::all_with(self.client(), &resource),
            namespace => Api::namespaced_with(self.client(), namespace, &resource),
        };
        self.block_on(api.patch(text("/metadata/name"), params, &Patch::Apply(object))).map(drop)
    }
}

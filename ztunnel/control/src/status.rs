//! Writes what is said of policies into their statuses. Every replica does, and finds most of it
//! written: what it writes is the same.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    report::{PolicyObject, Report, Unreported},
    source::Reports,
};

/// Between two writes: thousands of policies may come at once, and others want the API server, too.
const PAUSE: Duration = Duration::from_millis(5);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(10);

/// Writes what `reports` have, until `stop`.
pub async fn run(client: Client, mut reports: Reports, stop: CancellationToken) {
    let work = async {
        // What the API server will show soon, or refused.
        let mut tried: BTreeMap<PolicyObject, Report> = BTreeMap::new();
        // Said once, however long the API server is away.
        let (mut failing, mut again) = (false, false);
        loop {
            let all = Arc::clone(&reports.borrow_and_update());
            let is_tried = |one: &&Unreported| tried.get(&one.report.object) == Some(&one.report);
            let Some(next) = all.iter().find(|one| !is_tried(one)) else {
                tried.clear();
                failing &= again;
                if std::mem::take(&mut again) {
                    tokio::time::sleep(RETRY).await;
                } else if reports.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let object = &next.report.object;
            if let Err(error) = write(&client, next).await {
                again = true;
                if !std::mem::replace(&mut failing, true) {
                    let policy = format!("{} {}/{}", object.kind.name(), object.namespace, object.name);
                    warn!(policy, %error, "cannot write the policy's status; trying again");
                }
            }
            tried.insert(object.clone(), next.report.clone());
            tokio::time::sleep(PAUSE).await;
        }
    };
    let _ = stop.run_until_cancelled(work).await;
}

async fn write(client: &Client, unreported: &Unreported) -> Result<(), kube::Error> {
    let PolicyObject { kind, version, namespace, name } = &unreported.report.object;
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(kind.group(), version, kind.name()));
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default().to_string();
    let patch = json!({"status": {"conditions": unreported.conditions(now)}});
    match api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(_) => Ok(()),
        // It is gone.
        Err(kube::Error::Api(status)) if status.is_not_found() => {
            debug!(name, "the policy is gone, or its kind has no status");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

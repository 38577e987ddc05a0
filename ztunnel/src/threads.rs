//! Threads that serve pods: each has a single-threaded runtime, on which one task serves each pod.

use std::{convert::Infallible, io, sync::Arc, thread::JoinHandle, time::Duration};

use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{mpsc, oneshot},
    task::{JoinError, JoinSet},
};
use tracing::error;

use crate::{metrics::Metrics, pod::ServedPod, supervision::Supervisor};

/// A timer that is set before all others costs a system call, which wakes the thread out of its wait.
/// Since there is always this one, the limits of connections, which are longer, are not.
const EARLIEST_TIMER: Duration = Duration::from_mins(1);

/// The control runtime's handle on such a thread. `T`: the sockets that are opened for each pod.
#[derive(Debug)]
pub(crate) struct PodThread<T> {
    orders: mpsc::UnboundedSender<(Arc<ServedPod>, T)>,
    thread: JoinHandle<()>,
    /// Closed when the thread ends.
    ended: oneshot::Receiver<Infallible>,
}

impl<T: Send + 'static> PodThread<T> {
    /// Starts the thread `name`, which must not end before `supervisor` does. `prepare` runs on it
    /// and returns what serves one pod until the pod's `stop`.
    ///
    /// # Errors
    /// The process has no descriptors left for the runtime or for the thread's netns, or may start
    /// no more threads.
    pub(crate) fn start<S, F>(
        name: String,
        metrics: &Metrics,
        supervisor: &Supervisor,
        prepare: impl FnOnce() -> S + Send + 'static,
    ) -> io::Result<Self>
    where
        S: Fn(Arc<ServedPod>, T) -> F,
        F: Future<Output = ()> + 'static,
    {
        let (orders, pods) = mpsc::unbounded_channel();
        let lifeline = supervisor.lifeline(format!("the thread {name}"));
        let serve_all = async move || serve_pods(pods, prepare()).await;
        let (prepared, runs) = std::sync::mpsc::sync_channel(1);
        let (ending, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _ending = ending;
            // Later there may be no descriptors left, and without a way home it could enter no
            // netns.
            let runtime = adit_netns::remember_home().and_then(|()| {
                Builder::new_current_thread().enable_all().build_local(LocalOptions::default())
            });
            let known = match &runtime {
                Ok(runtime) => prepared.send(Ok(runtime.metrics())),
                Err(error) => prepared.send(Err(io::Error::new(error.kind(), error.to_string()))),
            };
            if let (Ok(()), Ok(runtime)) = (known, runtime) {
                runtime.block_on(serve_all());
            }
            lifeline.release();
        })?;
        metrics.runtimes.add(runs.recv().map_err(io::Error::other)??);
        Ok(Self { orders, thread, ended })
    }

    /// Serves `pod` on `sockets` until the pod's `stop`.
    ///
    /// # Errors
    /// The thread has ended, which only a panic makes it do.
    pub(crate) fn serve(&self, pod: &Arc<ServedPod>, sockets: T) -> io::Result<()> {
        self.orders
            .send((Arc::clone(pod), sockets))
            .map_err(|_| io::Error::other(format!("the thread {} has ended", name_of(&self.thread))))
    }

    /// Waits until all pods are done, each of which has been stopped.
    pub(crate) async fn finish(self) {
        let Self { orders, thread, ended } = self;
        drop(orders);
        let name = name_of(&thread).to_owned();
        // A process that may start no more threads must end in order too: so none waits for this one.
        let _ = ended.await;
        if thread.join().is_err() {
            error!(thread = name, "a thread panicked");
        }
    }
}

fn name_of(thread: &JoinHandle<()>) -> &str {
    thread.thread().name().unwrap_or_default()
}

async fn serve_pods<T, F>(
    mut orders: mpsc::UnboundedReceiver<(Arc<ServedPod>, T)>,
    serve: impl Fn(Arc<ServedPod>, T) -> F,
) where
    F: Future<Output = ()> + 'static,
{
    let mut pods = JoinSet::new();
    let mut earliest = tokio::time::interval(EARLIEST_TIMER);
    loop {
        tokio::select! {
            _ = earliest.tick() => {}
            order = orders.recv() => match order {
                Some((pod, sockets)) => { pods.spawn_local(serve(pod, sockets)); }
                None => break,
            },
            Some(ended) = pods.join_next() => report_panic(ended),
        }
    }
    finish_all(&mut pods).await;
}

/// Waits for all of `tasks`.
pub(crate) async fn finish_all(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        report_panic(ended);
    }
}

/// Logs a panic of one connection's or one query's task. It must not end the others, but it is a
/// fault of the tunnel.
pub(crate) fn report_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, thread = std::thread::current().name(), "a task panicked");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_is_reported_and_one_that_is_finished_is_not() {
        let (metrics, supervisor) = (Metrics::default(), Supervisor::default());
        let start = |name: &str, panics: bool| {
            PodThread::<()>::start(name.to_owned(), &metrics, &supervisor, move || {
                assert!(!panics, "on purpose");
                |_, ()| std::future::ready(())
            })
        };
        start("good", false).unwrap().finish().await;
        let bad = start("bad", true).unwrap();
        let ended = supervisor.ended_early().await;
        assert_eq!((&*ended.name, ended.panicked), ("the thread bad", true));
        bad.finish().await;
    }
}

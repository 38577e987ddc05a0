//! CPU and heap profiles in the format of pprof (`go tool pprof -http : FILE`), with function
//! names.
//!
//! The kernel takes CPU samples (perf_event_open(2)), not a signal handler, so that code may be
//! interrupted anywhere, also in the allocator or the unwinder: profiling a busy tunnel is safe.
//! jemalloc samples the heap, once activated.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use axum::{
    extract::Query,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use jemalloc_pprof::{PROF_CTL, StackProfile, WeightedStack};
use mappings::MAPPINGS;
use perf_event::{Builder, SampleFlag, Sampler, data::Record, events::Software};
use serde::Deserialize;
use tracing::info;

/// Bytes of each thread's sample buffer: a power of two of pages.
const RING: usize = 128 << 10;
const FETCH: Duration = Duration::from_millis(50);
/// Frames per stack; deeper stacks lose their outermost frames.
const FRAMES: u16 = 100;

#[derive(Deserialize)]
pub(super) struct CpuQuery {
    seconds: Option<u64>,
    frequency: Option<u64>,
}

pub(super) async fn cpu(Query(query): Query<CpuQuery>) -> Response {
    let (seconds, frequency) = (query.seconds.unwrap_or(10), query.frequency.unwrap_or(100));
    if !(1..=300).contains(&seconds) || !(1..=1000).contains(&frequency) {
        let expected =
            "seconds must be 1 to 300 (default 10), frequency 1 to 1000 samples a second (default 100)\n";
        return (StatusCode::BAD_REQUEST, expected).into_response();
    }
    let Some(running) = Running::begin() else {
        return (StatusCode::CONFLICT, "another CPU profile is being taken; try again when it ends\n")
            .into_response();
    };
    info!(seconds, frequency, "taking a CPU profile");
    let taken = tokio::task::spawn_blocking(move || {
        let _running = running;
        let stacks = sample(Duration::from_secs(seconds), frequency)?;
        Ok::<_, io::Error>(encode(stacks, frequency))
    });
    match taken.await {
        Ok(Ok(profile)) => attachment("cpu.pprof.gz", profile),
        Ok(Err(error)) => {
            let hint = "profiling needs perf_event_open(2): CAP_PERFMON (or CAP_SYS_ADMIN), or \
                        kernel.perf_event_paranoid of at most 2";
            (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot sample: {error}; {hint}\n")).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// Held while a profile is taken, since two profiles would sample each other.
struct Running;

static RUNNING: AtomicBool = AtomicBool::new(false);

impl Running {
    fn begin() -> Option<Self> {
        (!RUNNING.swap(true, Ordering::AcqRel)).then_some(Self)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.store(false, Ordering::Release);
    }
}

/// Samples all threads that exist now.
fn sample(lasting: Duration, frequency: u64) -> io::Result<Vec<Vec<u64>>> {
    let mut samplers = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let name = task?.file_name();
        let Some(thread) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        match sampler(thread, frequency) {
            Ok(sampler) => samplers.push(sampler),
            // The thread ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    let end = Instant::now() + lasting;
    let mut stacks = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        thread::sleep(left.min(FETCH));
        for sampler in &mut samplers {
            while let Some(record) = sampler.next_record() {
                if let Ok(Record::Sample(sample)) = record.parse_record()
                    && let Some(chain) = sample.callchain()
                {
                    // The topmost values are marks such as PERF_CONTEXT_USER, not addresses.
                    stacks.push(chain.iter().copied().filter(|&frame| frame < u64::MAX - 4095).collect());
                }
            }
        }
        if left.is_zero() {
            return Ok(stacks);
        }
    }
}

fn sampler(thread: i32, frequency: u64) -> io::Result<Sampler> {
    let counter = Builder::new(Software::CPU_CLOCK)
        .observe_pid(thread)
        .any_cpu()
        .exclude_kernel(true)
        .exclude_hv(true)
        .exclude_callchain_kernel(true)
        .sample_frequency(frequency)
        .sample(SampleFlag::CALLCHAIN)
        .sample_max_stack(FRAMES)
        .build()?;
    let mut sampler = counter.sampled(RING)?;
    sampler.enable()?;
    Ok(sampler)
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds between samples: below 2^30")]
fn encode(stacks: Vec<Vec<u64>>, frequency: u64) -> Vec<u8> {
    let mut profile = StackProfile::default();
    for mapping in MAPPINGS.iter().flatten() {
        profile.push_mapping(mapping.clone());
    }
    let nanoseconds = (1_000_000_000 / frequency) as f64;
    for stack in stacks {
        // An incomplete stack ends in 0, which the encoder cannot take.
        let addrs =
            stack.into_iter().filter_map(|frame| usize::try_from(frame).ok()).filter(|&at| at != 0).collect();
        profile.push_stack(WeightedStack { addrs, weight: nanoseconds }, None);
    }
    profile.to_pprof(("cpu", "nanoseconds"), ("cpu", "nanoseconds"), None)
}

pub(super) async fn heap() -> Response {
    let Some(control) = PROF_CTL.as_ref() else { return no_heap_profiling() };
    let control = std::sync::Arc::clone(control);
    let dumped = tokio::task::spawn_blocking(move || {
        let mut control = control.blocking_lock();
        control.activated().then(|| control.dump_pprof())
    });
    match dumped.await {
        Ok(Some(Ok(profile))) => attachment("heap.pprof.gz", profile),
        Ok(None) => {
            let how = "heap profiling is inactive: POST /debug/pprof/heap/profiling?activate=true, and try again later\n";
            (StatusCode::CONFLICT, how).into_response()
        }
        Ok(Some(Err(error))) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[derive(Deserialize)]
pub(super) struct HeapQuery {
    activate: Option<bool>,
}

/// Whether heap sampling is on. Changes nothing, whatever the query says.
pub(super) async fn heap_state() -> Response {
    heap_profiling(Query(HeapQuery { activate: None })).await
}

/// Switches heap sampling, if requested, and returns its state. Profiles lack what was allocated
/// while it was off.
pub(super) async fn heap_profiling(Query(query): Query<HeapQuery>) -> Response {
    let Some(control) = PROF_CTL.as_ref() else { return no_heap_profiling() };
    let mut control = control.lock().await;
    let changed = match query.activate {
        Some(true) => control.activate(),
        Some(false) => control.deactivate(),
        None => Ok(()),
    };
    match changed {
        Ok(()) if control.activated() => "heap profiling is active\n".into_response(),
        Ok(()) => "heap profiling is inactive\n".into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn no_heap_profiling() -> Response {
    (StatusCode::NOT_IMPLEMENTED, "this program's allocator was built or started without profiling\n")
        .into_response()
}

fn attachment(name: &str, profile: Vec<u8>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
    ];
    (headers, profile).into_response()
}

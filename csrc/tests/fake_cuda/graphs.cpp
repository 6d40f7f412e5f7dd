// The fake driver's stream capture and graphs. NOT A GPU.
#include <algorithm>
#include <atomic>

#include "fake.h"

namespace fake {
namespace {

constexpr int kModeGlobal = 0, kModeThreadLocal = 1, kModeRelaxed = 2;
constexpr int kStatusNone = 0, kStatusActive = 1, kStatusInvalidated = 2;

thread_local int thread_mode = kModeGlobal;

std::set<Capture*>& captures() {  // those that were begun and not ended
  static auto* captures = new std::set<Capture*>;
  return *captures;
}

std::set<Graph*>& graphs() {
  static auto* graphs = new std::set<Graph*>;
  return *graphs;
}

std::set<Executable*>& executables() {
  static auto* executables = new std::set<Executable*>;
  return *executables;
}

bool prohibits(const Capture& capture) {
  if (capture.mode == kModeRelaxed || thread_mode == kModeRelaxed) return false;
  if (capture.thread == std::this_thread::get_id()) return true;
  return capture.mode == kModeGlobal && thread_mode == kModeGlobal;
}

// All that a set of nodes depends on, with the nodes themselves.
std::set<std::size_t> ancestors(const Graph& graph, const std::set<std::size_t>& nodes) {
  std::set<std::size_t> found;
  std::vector<std::size_t> open(nodes.begin(), nodes.end());
  while (!open.empty()) {
    const std::size_t node = open.back();
    open.pop_back();
    if (!found.insert(node).second) continue;
    const auto& after = graph.nodes[node].after;
    open.insert(open.end(), after.begin(), after.end());
  }
  return found;
}

// A capture that joined a stream which the origin did not join again.
bool has_loose_stream(const Capture& capture) {
  const std::set<std::size_t> joined = ancestors(capture.graph, capture.origin->tip);
  for (const Stream* member : capture.members)
    if (!std::includes(joined.begin(), joined.end(), member->tip.begin(), member->tip.end()))
      return true;
  return false;
}

// One launch of a graph: a thread for each branch.
class Launch {
 public:
  explicit Launch(const Graph& graph)
      : graph_(graph), missing_(graph.nodes.size()), children_(graph.nodes.size()) {
    for (std::size_t node = 0; node < graph.nodes.size(); ++node) {
      missing_[node] = graph.nodes[node].after.size();
      for (const std::size_t before : graph.nodes[node].after) children_[before].push_back(node);
    }
  }

  void run() {
    std::vector<std::size_t> roots;
    for (std::size_t node = 0; node < graph_.nodes.size(); ++node)
      if (graph_.nodes[node].after.empty()) roots.push_back(node);
    start(roots);
  }

 private:
  // Runs the first in this thread, the others beside it; returns when all that follows is done.
  void start(std::vector<std::size_t> nodes) {
    std::vector<std::thread> branches;
    while (!nodes.empty()) {
      for (std::size_t index = 1; index < nodes.size(); ++index)
        branches.emplace_back([this, node = nodes[index]] { start({node}); });
      nodes = finish(nodes[0]);
    }
    for (std::thread& branch : branches) branch.join();
  }

  // Executes a node; the nodes that can run now.
  std::vector<std::size_t> finish(std::size_t index) {
    const Node& node = graph_.nodes[index];
    pause();
    if (!given_up()) node.work();
    note_progress();
    std::vector<std::size_t> ready;
    std::lock_guard<std::mutex> lock(mutex_);
    for (const std::size_t child : children_[index])
      if (--missing_[child] == 0) ready.push_back(child);
    return ready;
  }

  const Graph graph_;
  std::mutex mutex_;
  std::vector<std::size_t> missing_;  // predecessors that have not finished
  std::vector<std::vector<std::size_t>> children_;
};

}  // namespace

void invalidate(Capture& capture) { capture.invalidated = true; }

void forbid_during_capture() {
  bool prohibited = false;
  for (Capture* capture : captures())
    if (prohibits(*capture)) {
      invalidate(*capture);
      prohibited = true;
    }
  require(!prohibited, kCaptureUnsupported);
}

void add_node(Stream& stream, Node node) {
  Capture& capture = *stream.capture;
  require(!capture.invalidated, kCaptureInvalidated);
  node.after = stream.tip;
  capture.graph.nodes.push_back(std::move(node));
  stream.tip = {capture.graph.nodes.size() - 1};
}

bool wait_in_capture(Stream& stream, Event& event) {
  if (!stream.capture && !event.capture) return false;
  if (stream.capture && !event.capture) {  // the capture would depend on what is outside of it
    invalidate(*stream.capture);
    throw Failure{kCaptureIsolation};
  }
  require(!event.capture->ended, kCapturedEvent);
  require(!event.capture->invalidated, kCaptureInvalidated);
  if (stream.capture && stream.capture != event.capture) {
    invalidate(*stream.capture);
    invalidate(*event.capture);
    throw Failure{kCaptureMerge};
  }
  if (!stream.capture) {  // the stream joins the capture
    require(&stream != &stream_of(nullptr), kCaptureImplicit);
    stream.capture = event.capture;
    stream.capture->members.insert(&stream);
  }
  stream.tip.insert(event.nodes.begin(), event.nodes.end());
  return true;
}

bool record_in_capture(Stream& stream, Event& event) {
  if (!stream.capture) return false;
  require(!stream.capture->invalidated, kCaptureInvalidated);
  event.capture = stream.capture;
  event.nodes = stream.tip;
  return true;
}

std::size_t num_graphs() { return graphs().size() + executables().size(); }

}  // namespace fake

using namespace fake;

FAKE_API Result cuThreadExchangeStreamCaptureMode(int* mode) {
  return api([&](Lock&) {
    require(*mode >= kModeGlobal && *mode <= kModeRelaxed, kInvalidValue);
    std::swap(*mode, thread_mode);
  });
}

FAKE_API Result cuStreamBeginCapture_v2(void* handle, int mode) {
  return api([&](Lock&) {
    static std::uint64_t next_id = 1;
    Stream& stream = stream_of(handle);
    require(&stream != &stream_of(nullptr), kCaptureUnsupported);
    require(!stream.capture && mode >= kModeGlobal && mode <= kModeRelaxed, kIllegalState);
    stream.capture = std::make_shared<Capture>();
    stream.capture->id = next_id++;
    stream.capture->mode = mode;
    stream.capture->thread = std::this_thread::get_id();
    stream.capture->origin = &stream;
    stream.capture->members = {&stream};
    stream.tip.clear();
    captures().insert(stream.capture.get());
  });
}

FAKE_API Result cuStreamEndCapture(void* handle, void** result) {
  return api([&](Lock&) {
    *result = nullptr;
    Stream& stream = stream_of(handle);
    require(stream.capture != nullptr, kIllegalState);
    const std::shared_ptr<Capture> capture = stream.capture;
    require(capture->origin == &stream, kCaptureUnmatched);
    require(capture->mode == kModeRelaxed || capture->thread == std::this_thread::get_id(),
            kCaptureWrongThread);
    const bool loose = has_loose_stream(*capture);
    for (Stream* member : capture->members) {
      member->capture.reset();
      member->tip.clear();
    }
    capture->ended = true;
    captures().erase(capture.get());
    require(!capture->invalidated, kCaptureInvalidated);
    require(!loose, kCaptureUnjoined);
    auto* graph = new Graph(std::move(capture->graph));
    counts().graph_nodes = graph->nodes.size();
    graphs().insert(graph);
    *result = graph;
  });
}

FAKE_API Result cuStreamGetCaptureInfo_v2(void* handle, int* status, std::uint64_t* id, void**,
                                          void*, std::size_t*) {
  return api([&](Lock&) {
    const Stream& stream = stream_of(handle);
    *status = kStatusNone;
    if (!stream.capture) return;
    *status = stream.capture->invalidated ? kStatusInvalidated : kStatusActive;
    if (*status == kStatusActive && id != nullptr) *id = stream.capture->id;
  });
}

FAKE_API Result cuGraphInstantiateWithFlags(void** result, void* handle, unsigned long long flags) {
  return api([&](Lock&) {
    require_context();
    require(flags == 0 && graphs().count(static_cast<Graph*>(handle)) == 1, kInvalidValue);
    auto* executable = new Executable{*static_cast<Graph*>(handle), nullptr};
    executables().insert(executable);
    *result = executable;
  });
}

FAKE_API Result cuGraphLaunch(void* handle, void* stream_handle) {
  return api([&](Lock&) {
    Stream& stream = stream_of(stream_handle);
    require(executables().count(static_cast<Executable*>(handle)) == 1, kInvalidValue);
    require(!stream.capture, kCaptureUnsupported);
    auto& executable = *static_cast<Executable*>(handle);
    auto launch = std::make_shared<Launch>(executable.graph);
    std::vector<CompletionPtr> after;
    if (executable.last_launch) after.push_back(executable.last_launch);
    executable.last_launch = enqueue(stream, [launch] { launch->run(); }, std::move(after));
  });
}

FAKE_API Result cuGraphDestroy(void* handle) {
  return api([&](Lock&) {
    require(graphs().erase(static_cast<Graph*>(handle)) == 1, kInvalidValue);
    delete static_cast<Graph*>(handle);
  });
}

FAKE_API Result cuGraphExecDestroy(void* handle) {
  return api([&](Lock&) {
    require(executables().erase(static_cast<Executable*>(handle)) == 1, kInvalidValue);
    delete static_cast<Executable*>(handle);
  });
}

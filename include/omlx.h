// omlx.h - local language models as a library.
//
// This header is generated from the Rust sources by cbindgen: see cbindgen.toml. Do not edit it by hand.
//
// libomlx runs language models inside the calling process, computing with Apple's MLX on a CPU or a GPU. A host opens
// an engine pool over a folder of models, submits requests as JSON, and receives the tokens as they are made. A
// complete host is examples/c/chat.c.
//
// Contract of every function
//
//   Results      Most functions return an `omlx_status`. Outputs are written only on success. The last parameter,
//                `omlx_error **error`, may be NULL; otherwise it receives details when the call fails, and only then.
//                The host frees them with `omlx_error_release`. Nothing is printed, and a defect of the library comes
//                back as `OMLX_E_INTERNAL`; the process goes on.
//   Pointers     are NULL or valid. NULL where its parameter is not said to take NULL is `OMLX_E_INVALID_ARGUMENT`; in
//                functions without status it is ignored or gives an empty value. A pointer with a length or count
//                points to that many values, and strings without length end with a NUL byte. All text is UTF-8.
//   Handles      (`omlx_pool`, `omlx_request`, `omlx_download`) are reference-counted: the function that creates one gives
//                the host one reference, `_retain` adds one, `_release` drops one, in any order among handles. Everything
//                else that the library hands out through `**` has one owner, the host, and is freed by its `_release`
//                function. Data that the host passes in is copied before the call returns.
//   Threads      Every function may be called from any thread, several at once. Only the release of the last reference
//                must not race with another use of the same handle, and one thread at a time reads a request.
//   Callbacks    run on threads of the library with no lock held, so they may call any function that is not marked
//                blocking. `user_data` must be usable from any thread; its `destroy` function is called exactly once,
//                also when the call that takes it fails, and follows the rules of callbacks.
//   Blocking     functions are marked "Blocking". All others return at once and never wait for a model.
//   Options      Structs start with `struct_size` and only ever grow at their end; zero in a field means default. Start
//                from the `_INIT` macro. Bytes behind the end that the library knows must be zero.
//   Numbers      Fields and parameters of type uint32_t that hold an enumeration say which one. New enumerators may
//                appear: hosts ignore event kinds that they do not know.
//   Requests     are JSON objects in the shape of OpenAI's chat completions; see `omlx_generate`:
//                {"model": "tiny-chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
//   Environment  The first pool may set variables that MLX reads; see `omlx_pool_options.keep_environment`. Downloads
//                read those of the hub's own tools; see `omlx_download_start`.
//   Processes    The library starts no child processes. After fork() the child must not use it before exec().

#ifndef OMLX_H
#define OMLX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// An enumeration `name` whose values are stored as `type`.
#if defined(__cplusplus)
#define OMLX_ENUM(name, type) enum name : type
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L
#define OMLX_ENUM(name, type) enum name : type; typedef enum name name; enum name : type
#else
#define OMLX_ENUM(name, type) typedef type name; enum name
#endif

// Version ---------------------------------------------------------------------------------------------------

/// Version of the binary interface that this header describes. 0: it may still change from version to version.
#define OMLX_ABI_VERSION 0

/// The library's version, such as "0.1.0"; static memory.
const char *omlx_version(void);

/// The version of MLX that this build needs, exactly; static memory.
const char *omlx_mlx_version(void);

/// The binary interface that the loaded library offers: its `OMLX_ABI_VERSION`.
uint32_t omlx_abi_version(void);

// Status and errors -----------------------------------------------------------------------------------------

/// Outcome of a call. `0` is success, everything else names a class of failure a host can act on.
///
/// The numbers are part of the ABI: new ones are appended, none is ever reused.
OMLX_ENUM(omlx_status, int32_t) {
    /// Success.
    OMLX_OK = 0,
    /// A NULL or unusable pointer, an unknown `struct_size`, an option out of range.
    OMLX_E_INVALID_ARGUMENT = 1,
    /// The request's JSON is malformed, has an unknown key, or a value out of range.
    OMLX_E_INVALID_REQUEST = 2,
    /// No such model, file or folder.
    OMLX_E_NOT_FOUND = 3,
    /// The model type, weight format or request feature is not supported by this build.
    OMLX_E_UNSUPPORTED = 4,
    /// The model folder is damaged or inconsistent (config, weights, tokenizer).
    OMLX_E_INVALID_MODEL = 5,
    /// The prompt does not fit the model's context.
    OMLX_E_CONTEXT_LENGTH = 6,
    /// The request was cancelled by the host.
    OMLX_E_CANCELLED = 7,
    /// The pool is closed or closing.
    OMLX_E_CLOSED = 8,
    /// A queue is full; try again later.
    OMLX_E_BUSY = 9,
    /// The memory limit does not allow it.
    OMLX_E_OUT_OF_MEMORY = 10,
    /// The operating system refused an input or output operation.
    OMLX_E_IO = 11,
    /// The time allowed for a wait has passed; nothing is lost, call again.
    OMLX_E_TIMEOUT = 12,
    /// The chat template failed or refused the messages.
    OMLX_E_TEMPLATE = 13,
    /// The compute backend (MLX) failed or has the wrong version.
    OMLX_E_BACKEND = 14,
    /// A defect of this library (a panic was caught). The engine concerned is discarded.
    OMLX_E_INTERNAL = 15,
    /// The hub asks for an access token, or for its terms to be accepted.
    OMLX_E_UNAUTHORIZED = 16,
    /// A server cannot be reached, or does not answer as it should.
    OMLX_E_NETWORK = 17,
    /// The network would be needed, and offline mode forbids it.
    OMLX_E_OFFLINE = 18,
    /// The disk has too little room.
    OMLX_E_NO_SPACE = 19,
    /// What was downloaded is not what was announced: another checksum, length or version.
    OMLX_E_CHECKSUM = 20,
};

/// Name of a status, such as "OMLX_E_NOT_FOUND"; "OMLX_E_UNKNOWN" for a number that is none; static memory.
const char *omlx_status_name(int32_t status);

/// Details of a failed call. Owned by the host, freed with `omlx_error_release`.
typedef struct omlx_error omlx_error;

/// The status that the failed call returned; `OMLX_OK` for NULL.
omlx_status omlx_error_status(const omlx_error *error);

/// What went wrong, for people; alive as long as the error; "" for NULL.
const char *omlx_error_message(const omlx_error *error);

/// Milliseconds after which it makes sense to try again, after `OMLX_E_BUSY`; 0 if that is not known.
uint64_t omlx_error_retry_after_ms(const omlx_error *error);

/// Frees an error; NULL is ignored.
void omlx_error_release(omlx_error *error);

/// Checks that the loaded library fits the header the host was compiled with: pass `OMLX_ABI_VERSION`. It does if that is
/// between 1 and its own number, since interfaces with a number only grow; a library with the number 0 fits 0 alone.
///
/// `OMLX_E_UNSUPPORTED` if it does not; nothing else of the library may then be used.
omlx_status omlx_check_abi(uint32_t header_version, omlx_error **error);

// Returned text and token ids -------------------------------------------------------------------------------

/// Text that the library returned. Owned by the host, freed with `omlx_string_release`.
typedef struct omlx_string omlx_string;

/// The text: UTF-8, NUL-terminated, alive as long as the string; "" for NULL.
const char *omlx_string_data(const omlx_string *string);

/// Bytes of the text without the final NUL; 0 for NULL.
size_t omlx_string_len(const omlx_string *string);

/// Frees a string; NULL is ignored.
void omlx_string_release(omlx_string *string);

/// Token ids that the library returned. Owned by the host, freed with `omlx_tokens_release`.
typedef struct omlx_tokens omlx_tokens;

/// The ids, alive as long as `tokens`; NULL for NULL and if there are none.
const uint32_t *omlx_tokens_data(const omlx_tokens *tokens);

/// Number of ids; 0 for NULL.
size_t omlx_tokens_count(const omlx_tokens *tokens);

/// Frees token ids; NULL is ignored.
void omlx_tokens_release(omlx_tokens *tokens);

// Pools -----------------------------------------------------------------------------------------------------

/// Where to compute.
OMLX_ENUM(omlx_device, uint32_t) {
    /// The GPU if there is one, else the CPU.
    OMLX_DEVICE_AUTO = 0,
    /// The CPU.
    OMLX_DEVICE_CPU = 1,
    /// The GPU; `OMLX_E_UNSUPPORTED` if there is none.
    OMLX_DEVICE_GPU = 2,
};

/// Number format of weights that are not quantised, of keys and values, and on a GPU of activations.
OMLX_ENUM(omlx_dtype, uint32_t) {
    /// The model's own format.
    OMLX_DTYPE_AUTO = 0,
    /// 32-bit floats.
    OMLX_DTYPE_F32 = 1,
    /// 16-bit floats.
    OMLX_DTYPE_F16 = 2,
    /// 16-bit brain floats.
    OMLX_DTYPE_BF16 = 3,
};

/// How products with weights are computed on the CPU.
OMLX_ENUM(omlx_precision, uint32_t) {
    /// Quantised weights: activations are rounded to 8 bits per group of weights, about five times as fast. Others: sums
    /// of prompts are added in another order than those of answers.
    OMLX_PRECISION_FAST = 0,
    /// 32-bit floats, added in a fixed order: results do not depend on what else is computed, on `prefill_chunk` or
    /// on `threads` (except for weights in mxfp8, which MLX computes).
    OMLX_PRECISION_EXACT = 1,
};

/// How keys and values are stored in files.
OMLX_ENUM(omlx_cache_codec, uint32_t) {
    /// As they are: what is read is what was computed, bit for bit.
    OMLX_CACHE_CODEC_EXACT = 0,
    /// 8 bits a number, with a scale for each head of each token: half the size of 16-bit numbers, and answers that may
    /// differ.
    OMLX_CACHE_CODEC_BITS8 = 1,
};

/// Options of a pool. Start from `OMLX_POOL_OPTIONS_INIT`; zero means default.
typedef struct omlx_pool_options {
    /// `sizeof(omlx_pool_options)`, set by `OMLX_POOL_OPTIONS_INIT`.
    uint32_t struct_size;
    /// An `omlx_device`.
    uint32_t device;
    /// An `omlx_dtype`.
    uint32_t dtype;
    /// Upper limit of every model's context in tokens; 0 is the model's own.
    uint32_t context_length;
    /// A folder of model folders (flat or `org/model`), or one model folder. NULL takes the models that come with the
    /// library, in `share/omlx/models` or `models` in or above the folder of its file; without them the pool is empty.
    const char *models_dir;
    /// Id of the model for requests that name none. NULL takes the only usable model, if there is just one.
    const char *default_model;
    /// Prompt tokens in one forward pass; 0 is 128 on the CPU and 2048 on a GPU. Smaller values hear a cancel sooner.
    uint32_t prefill_chunk;
    /// Not 0: leave the environment alone. Otherwise, where MLX computes with CUDA, the first pool of the process sets
    /// those of `MLX_CUDA_GRAPH_CACHE_SIZE` (4096), `MLX_CUDA_SDPA_CACHE_SIZE` (2048), `MLX_ENABLE_CACHE_THRASHING_CHECK`
    /// (0), `MLX_MAX_OPS_PER_BUFFER` (100) and `MLX_MAX_MB_PER_BUFFER` (100000) that are not set. No other thread may
    /// call getenv() or setenv() meanwhile. With glibc it also sets M_MMAP_THRESHOLD to 4 MiB, so that large blocks return
    /// to the system when they are freed. Whatever this is, where MLX has no GPU every step sets MLX's memory limit, that of
    /// the whole process, to 16 MiB above what is in use.
    uint32_t keep_environment;
    /// Threads that compute on the CPU, at most 1024, shared by all engines of the process; 0 is the number of physical
    /// cores.
    uint32_t threads;
    /// An `omlx_precision`; without effect on a GPU.
    uint32_t precision;
    /// Answers of a model that are computed together; 0 is 8. More wait in the queue.
    uint32_t max_sequences;
    /// Requests that may wait for a model; 0 is 64. One more is refused with `OMLX_E_BUSY`.
    uint32_t queue_length;
    /// Bytes that keys and values of each model may take; 0 is an eighth of the machine's memory. Taken as they are needed.
    /// What no answer uses any more stays for later requests that begin with the same tokens.
    uint64_t cache_bytes;
    /// Tokens of a block of the KV cache, a power of two from 8 to 256; 0 is 32.
    uint32_t block_tokens;
    /// What a step should take while answers are running, in milliseconds; 0 is 50. Prompts are computed in pieces that
    /// keep to it: less makes running answers smoother, and new ones begin later.
    uint32_t target_latency_ms;
    /// A folder for keys and values that outlive the process: a prompt that was computed once is read from there, after a
    /// restart too. One process at a time can use it. NULL keeps nothing. The files tell what was said: they are created
    /// for their owner alone (0600 in 0700), marked as not to be backed up, and not encrypted.
    const char *cache_dir;
    /// Bytes that the files may take, of all models together; 0 is a tenth of what is free on that disk when the pool
    /// opens (their own included), 64 GiB at most. Nothing is written that leaves less than 2 GiB free.
    uint64_t cold_bytes;
    /// Bytes that the files of one model may take; 0 is no limit of its own.
    uint64_t cold_bytes_per_model;
    /// Bytes of the host's memory for keys and values that had to leave the pools; 0 is an eighth of the memory where
    /// pools lie in that of a GPU, and nothing where both are the same.
    uint64_t hot_bytes;
    /// Text that keeps users of one `cache_dir` apart: pools with different ones share nothing. NULL is none.
    const char *cache_namespace;
    /// Not 0: keys and values are written as soon as they are computed, not only when they have to make room, when a
    /// model has nothing to do, or when it is unloaded.
    uint32_t cache_write_through;
    /// An `omlx_cache_codec`.
    uint32_t cache_codec;
    /// Bytes that weights, caches and work of all models may take together. What does not fit makes the least recently used
    /// models go, waits for those that are in use, or is refused with `OMLX_E_OUT_OF_MEMORY`. 0 is what the system (or its
    /// container) can spare: all but 8 GiB, at least half, and never more than is available; on a GPU with memory of its
    /// own, what MLX would use of that.
    uint64_t memory_limit;
    /// The same as a part of the memory, in percent; 0 is none. Not together with `memory_limit`.
    uint32_t memory_percent;
    /// Seconds after which a model without requests is unloaded; 0: when its memory is needed.
    uint32_t ttl_seconds;
    /// A file that keeps what `omlx_model_configure` settles. It need not exist. NULL forgets it when the pool is closed.
    const char *settings_file;
    /// A folder in which tools of the Hugging Face hub keep models (`models--org--name/snapshots`): those are in the pool,
    /// too, as `org/name`, unless `models_dir` has that id. An empty text is the standard folder, which need not exist:
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else `~/.cache/huggingface/hub`. NULL looks into none. Nothing is written
    /// there.
    const char *hub_cache;
    /// As `hot_bytes`, as a part of the memory of the host, or of its container, in percent; 0 is none. Not together with
    /// `hot_bytes`.
    uint32_t hot_percent;
    /// Must be 0.
    uint32_t reserved;
} omlx_pool_options;

/// Initialiser of `omlx_pool_options`: all defaults.
#define OMLX_POOL_OPTIONS_INIT { sizeof(omlx_pool_options), 0, 0, 0, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0, NULL, 0, 0, 0, NULL, 0, 0, 0, 0, 0, NULL, NULL, 0, 0 }

/// An engine pool: models, and an engine for each one that is loaded. Reference-counted.
typedef struct omlx_pool omlx_pool;

/// Opens a pool and lists its models, loading none. `options` may be NULL. Blocking while the folders are read.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such folder), `OMLX_E_UNSUPPORTED` (no GPU), `OMLX_E_BACKEND` (MLX of another
/// version), `OMLX_E_BUSY` (another pool, of this process or of another one, uses the `cache_dir`), `OMLX_E_IO`.
omlx_status omlx_pool_open(const omlx_pool_options *options, omlx_pool **pool, omlx_error **error);

/// Ends all requests (their done events have `OMLX_E_CLOSED`) and downloads, unloads all models, and waits until the
/// engines' threads are gone and all callbacks have returned. Call it before the process exits: otherwise an exit hook
/// ends the engines, and the process waits for that, ten seconds at most. The handle stays valid, refuses further work
/// with `OMLX_E_CLOSED`, and must still be released. Blocking; in an event callback it may be called all the same, and
/// does not wait for callbacks then.
omlx_status omlx_pool_close(omlx_pool *pool, omlx_error **error);

/// How metrics are written.
OMLX_ENUM(omlx_metrics_format, uint32_t) {
    /// `{"models": {id: {name: number}}, "pool": {name: number}}`.
    OMLX_METRICS_FORMAT_JSON = 0,
    /// Prometheus's text format, version 0.0.4.
    OMLX_METRICS_FORMAT_PROMETHEUS = 1,
};

/// Counters and state of all loaded models: queue, steps, tokens, cache and its tiers; and of the pool: memory and tiers.
/// `format` is an `omlx_metrics_format`.
///
/// For supervisors: `"step_age_seconds"` of a model grows while one step is being computed, and is 0 while none is, whether
/// there are no requests or their readers are behind. One that only grows is a device, a kernel or a host's wake function that
/// does not return.
omlx_status omlx_pool_metrics(omlx_pool *pool, uint32_t format, omlx_string **text, omlx_error **error);

/// The pool's memory and its models that are loaded, or about to be, as a JSON object:
///
///   "device"   "cpu" or "gpu"
///   "memory"   bytes: "limit", "used", "peak" (the most that was ever used), "waiting" (what models wait for), "owners"
///              (by model: "weights", "cache", "workspace", "hot"), "footprint" (of the process), "unaccounted" (what it has
///              beyond "used" and what it had when the pool was opened), "system_total" and "system_available"; and
///              "pressure", of the whole system: 0, 1 (caches shrink) or 2 (idle models go)
///   "models"   by id: "state" ("loading", "loaded" or "failed"; then "error"), "loaded_bytes" of "weight_bytes",
///              "requests" that have not ended, "idle_seconds", "pinned" and "ttl_seconds"
///   "leaving"  engines that end their last requests, or give their memory back
///
/// More keys may come.
omlx_status omlx_pool_status(omlx_pool *pool, omlx_string **status_json, omlx_error **error);

/// Changes `memory_limit` or `memory_percent` of the pool's options while it is open; both 0 is automatic. What is beyond
/// the new limit goes as soon as no request uses it.
omlx_status omlx_pool_set_memory_limit(omlx_pool *pool, uint64_t bytes, uint32_t percent, omlx_error **error);

/// Adds a reference; NULL is ignored.
void omlx_pool_retain(omlx_pool *pool);

/// Drops a reference; NULL is ignored. The last one closes the pool without waiting for its threads.
void omlx_pool_release(omlx_pool *pool);

// Models ----------------------------------------------------------------------------------------------------

/// All models of the pool as a JSON array, ordered by id. Each object has "id", "loaded", "file_bytes" (of the weight files)
/// and, where known:
///
///   "alias"            another name for it in requests
///   "folder"           its path
///   "kind"             "llm", "embedding", "reranker" or "vision": settled by `omlx_model_configure`, else detected
///   "model_type"       the architecture
///   "context_length"   tokens
///   "quantization"     an object with "bits", "group_size" and "mode" ("affine", "mxfp4", "mxfp8" or "nvfp4"), but for
///                      exceptions of single layers; "quantization_bits" is the first
///   "license"          as its README.md names it
///   "license_file"     path of the file with its text
///   "problem"          why it cannot be used: the config is damaged, weights are missing or have another format, the
///                      architecture is not supported; of a vision model it begins with "unsupported: vision"
///   "problem_status"   the class of that, such as "OMLX_E_UNSUPPORTED": requests for the model fail with it
///   "device"           of a loaded one, "cpu" or "gpu"
///   "weight_bytes", "load_seconds"   of a loaded one
///
/// Folders that only look like models are listed with their problem, too. More keys may come.
omlx_status omlx_pool_models(omlx_pool *pool, omlx_string **models_json, omlx_error **error);

/// Adds the model in `folder` under `id`; an `id` of NULL takes the folder's name. Loads nothing, but reads the model's
/// config. Blocking for that.
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_MODEL` (damaged config), `OMLX_E_UNSUPPORTED` (unknown type; the
/// message lists the known ones), `OMLX_E_INVALID_ARGUMENT` (id in use).
omlx_status omlx_pool_add_model(omlx_pool *pool, const char *folder, const char *id, omlx_error **error);

/// Looks into the pool's `models_dir` and `hub_cache` again: models that are new or have changed come in, and those that are
/// gone go out, also of those that were added or downloaded. Loaded ones stay as they are. If a folder cannot be read,
/// nothing changes. Blocking while the folders are read.
///
/// Errors: `OMLX_E_NOT_FOUND` (a folder is gone), `OMLX_E_IO`, `OMLX_E_CLOSED`.
omlx_status omlx_pool_rescan(omlx_pool *pool, omlx_error **error);

/// Loads a model and waits until it is ready. Requests load their model by themselves; this does it before them.
/// Blocking.
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_MODEL` (the message names what is missing or damaged),
/// `OMLX_E_UNSUPPORTED`, `OMLX_E_OUT_OF_MEMORY` (the memory limit does not allow it), `OMLX_E_CANCELLED` (it was unloaded
/// meanwhile), `OMLX_E_CLOSED`.
omlx_status omlx_model_load(omlx_pool *pool, const char *id, omlx_error **error);

/// Unloads a model and waits until its memory is free. `drain` 0 cancels its requests, otherwise they end first (later ones
/// load the model again at once, beside it). `freed`, which may be NULL, receives the bytes that became free. A model that is
/// not loaded is no error; the next request loads it again. Blocking.
omlx_status omlx_model_unload(
    omlx_pool *pool,
    const char *id,
    uint32_t drain,
    uint64_t *freed,
    omlx_error **error);

/// Changes what is settled about a model, by a JSON object of `settings_len` bytes; null takes a key back (RFC 7396). It
/// holds at once, and is in the pool's `settings_file` when this returns:
///
///   "alias"           another name for it in requests
///   "pinned"          true: it is not unloaded to make room, nor when its time is up
///   "preload"         true: it is loaded now, and when a pool with these settings is opened
///   "ttl_seconds"     it is unloaded after so many seconds without a request; below 0: only when its memory is needed
///   "context_length"  tokens of a prompt and its answer at most, where that is less than the model can
///   "kind"            "llm", "embedding" or "reranker": what it is used for, where its folder tells something else. If it is
///                     loaded, it ends the requests it has; the next one loads it anew
///   "defaults"        for requests that do not say: "max_tokens", "temperature", "top_p", "top_k", "min_p",
///                     "repetition_penalty", "presence_penalty", "frequency_penalty", "thinking_budget" and
///                     "chat_template_kwargs"
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_ARGUMENT`, `OMLX_E_IO` (the file cannot be written: nothing has changed).
omlx_status omlx_model_configure(
    omlx_pool *pool,
    const char *id,
    const char *settings_json,
    size_t settings_len,
    omlx_error **error);

/// What is settled about a model, as the JSON object that `omlx_model_configure` takes; nothing is "{}".
omlx_status omlx_model_settings(
    omlx_pool *pool,
    const char *id,
    omlx_string **settings_json,
    omlx_error **error);

// Events ----------------------------------------------------------------------------------------------------

/// Kinds of events. Hosts ignore kinds they do not know.
OMLX_ENUM(omlx_event_kind, uint32_t) {
    /// A piece of the answer: `text`, `tokens` and `logprobs`. The text may be empty, while a character, a possible
    /// stop string or a mark is incomplete.
    OMLX_EVENT_KIND_TEXT = 1,
    /// The end of the request, exactly once and last: `finish_reason`, `status`, `error_message` and `usage`.
    OMLX_EVENT_KIND_DONE = 2,
    /// The end of one of several answers: `choice` and `finish_reason`. Not sent for the only one.
    OMLX_EVENT_KIND_CHOICE_DONE = 3,
    /// The vectors of an `omlx_embed`: `values` with a row for each text; `text`, if base64 was asked for; `truncated`.
    OMLX_EVENT_KIND_EMBEDDINGS = 4,
    /// The scores of an `omlx_rerank`: `values` with a row for each document; `order`; `truncated`.
    OMLX_EVENT_KIND_SCORES = 5,
    /// The model is being loaded: `loaded_bytes` of `total_bytes`. Only for requests that asked for it.
    OMLX_EVENT_KIND_LOADING = 6,
    /// A piece of what the model thinks before it answers; fields as for text. Chat requests only.
    OMLX_EVENT_KIND_REASONING = 7,
    /// A piece of a tool call: `text` is the next piece of its arguments, together JSON text; `tool_index`, `tool_id` and
    /// `tool_name` are the same in all pieces of a call, the first of which has no text. `tokens` and `logprobs` as for
    /// text. A call that is malformed or cut off ends early, and its rest is text. Chat requests with tools only.
    OMLX_EVENT_KIND_TOOL_CALL = 8,
    /// The prompt begins to be computed: `prompt_tokens` and `cached_tokens` of `usage`, of which the latter may grow until the
    /// end, where another request computes the same. Before any text, and only for requests that asked for it.
    OMLX_EVENT_KIND_STARTED = 9,
};

/// Why a request ended.
OMLX_ENUM(omlx_finish_reason, uint32_t) {
    /// It has not ended.
    OMLX_FINISH_REASON_NONE = 0,
    /// The model ended its turn, or a stop string or stop token came.
    OMLX_FINISH_REASON_STOP = 1,
    /// `max_tokens` or the end of the context was reached.
    OMLX_FINISH_REASON_LENGTH = 2,
    /// The host cancelled it, or its model was unloaded.
    OMLX_FINISH_REASON_CANCELLED = 3,
    /// See `status` and `error_message`.
    OMLX_FINISH_REASON_ERROR = 4,
    /// The model ended its turn, and has made at least one whole tool call, for which it awaits results.
    OMLX_FINISH_REASON_TOOL_CALLS = 5,
};

/// Log-probability of a token: natural logarithm, of the model's own distribution before penalties and temperature.
typedef struct omlx_token_logprob {
    /// Token id.
    uint32_t token;
    /// Its log-probability.
    float logprob;
    /// The token's bytes; may hold a part of a character. Not NUL-terminated.
    const uint8_t *bytes;
    /// Number of bytes.
    size_t byte_count;
    /// The likeliest tokens in its place, best first; NULL unless asked for. Their own `top` is NULL.
    const struct omlx_token_logprob *top;
    /// Number of likeliest tokens.
    size_t top_count;
} omlx_token_logprob;

/// Counts and times of a request.
typedef struct omlx_usage {
    /// Tokens of the prompt.
    uint64_t prompt_tokens;
    /// Prompt tokens that a cache had already.
    uint64_t cached_tokens;
    /// Tokens sampled, an end-of-turn token included.
    uint64_t completion_tokens;
    /// Those of them that were reasoning, its marks included.
    uint64_t reasoning_tokens;
    /// From `omlx_generate` to the first token, loading the model included; 0 if none came.
    double seconds_to_first_token;
    /// Rate of the tokens after the first, per second; 0 with fewer than two.
    double tokens_per_second;
} omlx_usage;

/// One event. It and all it points to live until the callback returns, or until the next call of
/// `omlx_request_next` on the same request.
typedef struct omlx_event {
    /// Bytes of this struct in the library that fills it; fields behind the end are not there.
    uint32_t struct_size;
    /// An `omlx_event_kind`.
    uint32_t kind;
    /// Which of several answers; 0 for the only one.
    uint32_t choice;
    /// An `omlx_finish_reason`.
    uint32_t finish_reason;
    /// Whole UTF-8 characters, NUL-terminated; never NULL. May contain NUL characters: use `text_len`.
    const char *text;
    /// Bytes of text.
    size_t text_len;
    /// Ids of the tokens sampled since the last event; NULL if there are none.
    const uint32_t *tokens;
    /// Number of tokens.
    size_t token_count;
    /// One per token if the request asked for log-probabilities, else NULL.
    const omlx_token_logprob *logprobs;
    /// Number of log-probabilities.
    size_t logprob_count;
    /// An `omlx_status`: why the request failed or was cancelled, else `OMLX_OK`.
    int32_t status;
    /// Which tool call of the answer, from 0.
    uint32_t tool_index;
    /// Id of the tool call, for the message with its result, NUL-terminated; never NULL.
    const char *tool_id;
    /// Name of the called tool, NUL-terminated; never NULL. It need not be one that the request has.
    const char *tool_name;
    /// Details of the failure, NUL-terminated; never NULL.
    const char *error_message;
    /// Filled in the done event; in the started event as far as it is known.
    omlx_usage usage;
    /// Numbers `[rows, columns]`, row after row, in the order of the request's texts; NULL if there are none.
    const float *values;
    /// Texts.
    size_t rows;
    /// Numbers for each text: the dimensions of a vector, or 1 for a score.
    size_t columns;
    /// Which documents have the best scores, best first: `top_n` of them, or all; NULL if there are none.
    const uint32_t *order;
    /// Number of these documents.
    size_t order_count;
    /// Texts of which the end was left out because they were too long.
    size_t truncated;
    /// Bytes of the model's weights that are there.
    uint64_t loaded_bytes;
    /// Bytes that there will be; 0 until that is known, and while the model waits for memory.
    uint64_t total_bytes;
    /// The stop string that ended the answer, NUL-terminated; empty if none did; never NULL. In the done event and at the end
    /// of one of several answers.
    const char *stop_string;
} omlx_event;

// Requests --------------------------------------------------------------------------------------------------

/// Receives the events of a request, one call at a time, the done event last. Return 0 to go on; anything else
/// cancels the request, and only its done event follows. A slow callback delays its own request only: text that waits
/// is merged into one event.
typedef int32_t (*omlx_event_fn)(void *user_data, const omlx_event *event);

/// Told that an event is available where none was: fetch events with a timeout of 0 until `OMLX_E_TIMEOUT` or
/// `OMLX_E_CLOSED`, in the call or later elsewhere. It may come late, for an event that was fetched already. It must
/// return quickly: the model waits for it.
typedef void (*omlx_wake_fn)(void *user_data);

/// Called exactly once, when the library will not use `user_data` again.
typedef void (*omlx_destroy_fn)(void *user_data);

/// How a request is delivered, of whatever kind it is. Start from `OMLX_GENERATE_OPTIONS_INIT`; zero means default.
typedef struct omlx_generate_options {
    /// `sizeof(omlx_generate_options)`, set by `OMLX_GENERATE_OPTIONS_INIT`.
    uint32_t struct_size;
    /// Not 0: ignore keys of the request that the library does not know. 0 makes them `OMLX_E_INVALID_REQUEST`.
    uint32_t lenient;
    /// Receives the events. NULL: the host fetches them with `omlx_request_next` instead.
    omlx_event_fn callback;
    /// Passed to `callback` and `destroy`.
    void *user_data;
    /// NULL, or called exactly once: after the last callback, or when `omlx_generate` fails. Only if it refuses the
    /// `struct_size` as too small, nothing is called.
    omlx_destroy_fn destroy;
    /// Not 0: the events begin with `OMLX_EVENT_KIND_LOADING` while the model is being loaded.
    uint32_t loading_events;
    /// Not 0: there is an `OMLX_EVENT_KIND_STARTED` before the first text. Not for texts that are encoded.
    uint32_t started_event;
} omlx_generate_options;

/// Initialiser of `omlx_generate_options`: all defaults.
#define OMLX_GENERATE_OPTIONS_INIT { sizeof(omlx_generate_options), 0, NULL, NULL, NULL, 0, 0 }

/// A generation, or texts that are encoded. Reference-counted; it does not need its pool's handle to live on.
typedef struct omlx_request omlx_request;

/// Starts a generation and returns at once: loading the model, rendering and tokenising happen on other threads, and
/// what fails there arrives in the done event.
///
/// `request_json` is a JSON object of `request_len` bytes with the keys of OpenAI's chat completions and those that
/// local servers have added to them:
///
///   what to answer   "messages", with what the chat template takes: "chat_template" (the name of one of the
///                    model's), "chat_template_kwargs", "add_generation_prompt"; or "prompt", a text or token ids
///   what to call     "tools", "tool_choice" ("auto"; "none": the model is not told of them; "required" or {"type":"function",
///                    "function":{"name":N}}: the answer is calls, whose arguments the tool's schema accepts),
///                    "parallel_tool_calls" (false: the answer ends with its first call)
///   by which model   "model": an id of `omlx_pool_models`
///   how to sample    "temperature" (0 is greedy), "top_p", "top_k", "min_p", "seed", "repetition_penalty",
///                    "presence_penalty", "frequency_penalty", "logit_bias"
///   in which form    "response_format": {"type":T}, where T is "text", "json_object", "json_schema" (with "json_schema":
///                    {"schema":S}), "regex" ("regex":R), "choice" ("choices":[..]) or "grammar" ("grammar":G, in the Lark
///                    dialect of llguidance); the answer has it unless it ends with `OMLX_FINISH_REASON_LENGTH` or at a stop
///                    string, or calls tools, if there are any. Thinking may come before it
///   how to think     "thinking_budget": tokens of thinking at most; then it is ended
///   when to stop     "max_tokens" or "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos"
///   what to report   "logprobs", "top_logprobs"
///   how many answers "n", at most 16; each has its `choice` in the events, and its own end before the done event
///   before whom      "priority": "high", "normal" or "low"; within a class the first to come is first
///
/// What is not given comes from the model's generation_config.json, else sampling is greedy and the context is the only
/// limit. What the model thinks before it answers "messages", and what it calls if there are "tools", are events of their
/// own where its way to write them is known; an answer to a "prompt" is text. Requests on one model are computed together,
/// as many as `max_sequences` of the pool's options says; more wait.
///
/// `options` may be NULL. `request` receives a handle; it may be NULL if there is a callback, which may run before this
/// function returns.
///
/// Parts of messages other than text (pictures, sounds, films, files, also in results of tools) are `OMLX_E_UNSUPPORTED`.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_UNSUPPORTED`, `OMLX_E_NOT_FOUND` (model), `OMLX_E_BUSY` (too many wait:
/// `omlx_error_retry_after_ms`), `OMLX_E_CLOSED`. A prompt that the KV cache cannot hold ends with `OMLX_E_OUT_OF_MEMORY`.
omlx_status omlx_generate(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    const omlx_generate_options *options,
    omlx_request **request,
    omlx_error **error);

/// Starts to compute the vectors of texts and returns at once. The request's events are one `OMLX_EVENT_KIND_EMBEDDINGS` and the
/// done event; callbacks, `omlx_request_next` and cancelling are those of `omlx_generate`.
///
/// `request_json` is a JSON object of `request_len` bytes with the keys of OpenAI's embeddings, and some more:
///
///   what to encode   "input": a text, an array of texts, token ids, or an array of arrays of them (which are taken as
///                    they are, without special tokens); at most 65536 texts. What a model wants to be told before a
///                    text ("query: ") is the host's to write.
///   by which model   "model": the id of an embedding model
///   the vectors      "dimensions": the first ones only; "normalize": whether their length is 1 (by default as the model's
///                    folder says); "encoding_format": "float", or "base64", which gives them as `text`, too: a JSON array
///                    of strings, each a vector of 32-bit floats, lowest byte first
///   long texts       "truncate": true (the default) leaves out the end of a text that is too long, and the event says of
///                    how many; false makes it `OMLX_E_CONTEXT_LENGTH`
///   before whom      "priority": "high", "normal" or "low"
///
/// Texts of all requests share batches, in turns. `usage.prompt_tokens` counts all tokens.
///
/// Errors: those of `omlx_generate`; `OMLX_E_UNSUPPORTED` if the model is none for embeddings.
omlx_status omlx_embed(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    const omlx_generate_options *options,
    omlx_request **request,
    omlx_error **error);

/// Starts to compute how well documents answer a query and returns at once. The request's events are one
/// `OMLX_EVENT_KIND_SCORES` and the done event, otherwise like `omlx_embed`.
///
/// `request_json` is a JSON object of `request_len` bytes:
///
///   "query"        a text
///   "documents"    an array of texts, or of objects with a "text"; at most 65536
///   "model"        the id of a reranker
///   "top_n"        how many of the best documents `order` lists; all by default
///   "instruction"  what relevance means, for models that are told
///   "truncate", "priority"  as for `omlx_embed`
///
/// Scores are what the model's cross-encoder gives, usually between 0 and 1; only those of one model can be compared.
///
/// Errors: those of `omlx_generate`; `OMLX_E_UNSUPPORTED` if the model is no reranker.
omlx_status omlx_rerank(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    const omlx_generate_options *options,
    omlx_request **request,
    omlx_error **error);

/// Id of the model that answers a request: as in `omlx_pool_models`, also where the request had an alias or none. Alive as
/// long as the request; "" for NULL.
const char *omlx_request_model(const omlx_request *request);

/// Waits `timeout_ms` milliseconds for the next event of a request without callback; 0 never waits, a negative timeout
/// waits for ever. `event` is valid until the next event is fetched or the request is released. Blocking unless
/// `timeout_ms` is 0.
///
/// Errors: `OMLX_E_TIMEOUT` (none came in time), `OMLX_E_CLOSED` (the done event was fetched already).
omlx_status omlx_request_next(
    omlx_request *request,
    int64_t timeout_ms,
    const omlx_event **event,
    omlx_error **error);

/// Sets a function that is called when an event becomes available, before this returns if one is waiting already: for
/// run loops that must not block. NULL removes it; the old one may still be running then, so its data is freed in its
/// `destroy` only. `user_data` and `destroy` may be NULL. `OMLX_E_INVALID_ARGUMENT` for a request with a callback.
omlx_status omlx_request_set_wake(
    omlx_request *request,
    omlx_wake_fn wake,
    void *user_data,
    omlx_destroy_fn destroy,
    omlx_error **error);

/// Asks the request to end; its done event comes within one step of the model, or when the model is loaded. NULL and
/// ended requests are ignored.
void omlx_request_cancel(omlx_request *request);

/// Adds a reference; NULL is ignored.
void omlx_request_retain(omlx_request *request);

/// Drops a reference; NULL is ignored. With the last one a request without callback is cancelled; one with a callback
/// goes on.
void omlx_request_release(omlx_request *request);

// Downloads -------------------------------------------------------------------------------------------------

/// What a download is doing.
OMLX_ENUM(omlx_download_state, uint32_t) {
    /// Asking the hub which files there are.
    OMLX_DOWNLOAD_STATE_LISTING = 0,
    /// Fetching and checking files.
    OMLX_DOWNLOAD_STATE_FETCHING = 1,
    /// Writing through and moving into place.
    OMLX_DOWNLOAD_STATE_INSTALLING = 2,
    /// Over: the model is there, and in the pool.
    OMLX_DOWNLOAD_STATE_DONE = 3,
    /// Over: it failed. `omlx_download_wait` says why.
    OMLX_DOWNLOAD_STATE_FAILED = 4,
    /// Over: it was cancelled.
    OMLX_DOWNLOAD_STATE_CANCELLED = 5,
};

/// How far a download is. Start from `OMLX_DOWNLOAD_PROGRESS_INIT`. The host computes rates, from the growth of
/// `bytes_done`.
typedef struct omlx_download_progress {
    /// `sizeof(omlx_download_progress)`, set by `OMLX_DOWNLOAD_PROGRESS_INIT`: no more is written.
    uint32_t struct_size;
    /// An `omlx_download_state`.
    uint32_t state;
    /// Bytes that are there, `bytes_kept` included. Falls when a file has to be fetched anew.
    uint64_t bytes_done;
    /// Bytes of all files; 0 until they are listed.
    uint64_t bytes_total;
    /// Bytes that an earlier attempt, or the version that is being replaced, had left.
    uint64_t bytes_kept;
    /// Files that are complete and checked.
    uint64_t files_done;
    /// All files; 0 until they are listed.
    uint64_t files_total;
    /// Requests that were repeated after a failure.
    uint64_t retries;
} omlx_download_progress;

/// Initialiser of `omlx_download_progress`: all defaults.
#define OMLX_DOWNLOAD_PROGRESS_INIT { sizeof(omlx_download_progress), 0, 0, 0, 0, 0, 0, 0 }

/// A download. Reference-counted; it does not need its pool's handle to live on.
typedef struct omlx_download omlx_download;

/// Starts to download a model from the Hugging Face hub, or a mirror of it, and returns at once. When the download is
/// over, the model is in the pool, its id the repository's name; if the folder is not a usable model,
/// `omlx_pool_models` says why.
///
/// `download_json` is a JSON object of `download_len` bytes:
///
///   "repo"         the repository, such as "org/name"
///   "revision"     a branch, tag or commit, else "main"
///   "files"        exactly these files; or
///   "patterns"     files that any of these describes: `*` is any text within one folder, `**` any text, `?` one
///                  character; else what a model needs, as safetensors
///   "folder"       the folder of models, else the pool's `models_dir`; the model goes to org/name in it
///   "endpoint"     URL of the hub, else HF_ENDPOINT of the environment, else https://huggingface.co
///   "token"        access token, else HF_TOKEN, else what the hub's login command left (unless the endpoint is neither
///                  encrypted nor this machine). Sent to the endpoint alone; never part of a message
///   "offline"      do not use the network: OMLX_E_OFFLINE unless the model is there; else HF_HUB_OFFLINE decides
///   "connections"  at the same time; else 4, at most 32
///
/// All files come from one commit. They are put together in a hidden folder beside the model's, checked (SHA-256, for
/// small files the id of the git blob), written through, and put into place at once: a model is there whole or not at
/// all. What an attempt leaves that was cancelled or broke off, the next one goes on with. A model that is there is
/// left alone; if it came by a download and "revision" asks for another commit, it is replaced, and a loaded one goes
/// on as it was until it is unloaded. Connections use HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, and trust
/// Mozilla's certificates, or those in the PEM file that SSL_CERT_FILE names.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_CLOSED`; others come from `omlx_download_wait`.
omlx_status omlx_download_start(
    omlx_pool *pool,
    const char *download_json,
    size_t download_len,
    omlx_download **download,
    omlx_error **error);

/// Says how far a download is.
omlx_status omlx_download_status(
    omlx_download *download,
    omlx_download_progress *progress,
    omlx_error **error);

/// Receives the progress of a download, one call at a time, that with the last state last: at once, with every new state,
/// and ten times a second at most while bytes come. Return 0 to go on; anything else cancels the download. It must return
/// quickly: the download waits for it. `progress` is valid until it returns.
typedef int32_t (*omlx_progress_fn)(void *user_data, const omlx_download_progress *progress);

/// Has `callback` called with the progress from now on, the first time before this returns; NULL removes it. The last
/// call comes before an `omlx_download_wait` that waits returns. `user_data` and `destroy` may be NULL; `destroy` runs when
/// the download is over or another callback takes its place, but not during a call.
omlx_status omlx_download_set_callback(
    omlx_download *download,
    omlx_progress_fn callback,
    void *user_data,
    omlx_destroy_fn destroy,
    omlx_error **error);

/// Waits `timeout_ms` milliseconds until a download is over; 0 never waits, a negative timeout waits for ever.
/// `result_json`, which may be NULL, receives an object with "id", "folder", "commit" (null for a folder that something
/// else put there) and "changed" (false if everything was there already). Blocking unless `timeout_ms` is 0.
///
/// Errors: `OMLX_E_TIMEOUT` (it is still running); and why it failed: `OMLX_E_CANCELLED` (also by `omlx_pool_close`),
/// `OMLX_E_NOT_FOUND` (repository, revision or file), `OMLX_E_UNAUTHORIZED` (a token is needed, or terms have to be
/// accepted; the message says which), `OMLX_E_OFFLINE`, `OMLX_E_NO_SPACE` (with the numbers), `OMLX_E_NETWORK` (with
/// the cause), `OMLX_E_CHECKSUM` (something else came than was announced), `OMLX_E_BUSY` (another download of this
/// model is running, in any process; or the hub has had enough: `omlx_error_retry_after_ms`), `OMLX_E_INVALID_REQUEST`
/// (the folder is there, and no download put it there), `OMLX_E_INVALID_MODEL` (file names that lead out of the
/// folder), `OMLX_E_IO`.
omlx_status omlx_download_wait(
    omlx_download *download,
    int64_t timeout_ms,
    omlx_string **result_json,
    omlx_error **error);

/// Asks a download to end; it is over within a second, unless the disk takes longer to write a file through. What has
/// been fetched stays in the hidden folder for the next attempt. NULL and downloads that are over are ignored.
void omlx_download_cancel(omlx_download *download);

/// Adds a reference; NULL is ignored.
void omlx_download_retain(omlx_download *download);

/// Drops a reference; NULL is ignored. With the last one the download is cancelled, without waiting for that.
void omlx_download_release(omlx_download *download);

// Tokens and templates --------------------------------------------------------------------------------------

/// Token ids of a text. A `model` of NULL is the default model. With `add_special_tokens` not 0 the tokenizer adds what
/// it puts around a text, often a token at its beginning. No weights are loaded. Blocking while the tokenizer is read.
omlx_status omlx_tokenize(
    omlx_pool *pool,
    const char *model,
    const char *text,
    size_t text_len,
    int32_t add_special_tokens,
    omlx_tokens **tokens,
    omlx_error **error);

/// Text of token ids, special tokens included; what is not UTF-8 becomes U+FFFD. A `model` of NULL is the default
/// model. Blocking while the tokenizer is read.
omlx_status omlx_detokenize(
    omlx_pool *pool,
    const char *model,
    const uint32_t *tokens,
    size_t token_count,
    omlx_string **text,
    omlx_error **error);

/// The prompt that a chat template makes of a request, which is JSON as for `omlx_generate`, with "messages"; `lenient` as in
/// `omlx_generate_options`. Blocking while the tokenizer is read.
///
/// Errors: `OMLX_E_TEMPLATE` (the template failed or refused the messages), and those of `omlx_generate`.
omlx_status omlx_render_template(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    int32_t lenient,
    omlx_string **text,
    omlx_error **error);

// Cache -----------------------------------------------------------------------------------------------------

/// State of a model's cache as a JSON object: if it is loaded, blocks used, cached and free, the tokens and bytes of one,
/// entries, prompt tokens computed and found in the cache; in `"hot"` and `"cold"` the model's part of the other tiers
/// (entries, bytes, tokens found there), and in `"cold_total"` that of all models together. Of files also what was read and
/// written since the pool was opened: `"read_bytes"` by `"read_seconds"` is the rate of restoring,
/// `"written_bytes_per_new_token"` the price of a computed token. A `model` of NULL is the default model; it may be the
/// id of one that is no longer there, but in the files.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such model, and nothing cached of one), `OMLX_E_UNSUPPORTED` (an embedding model or a
/// reranker).
omlx_status omlx_cache_stats(omlx_pool *pool, const char *model, omlx_string **text, omlx_error **error);

/// Where the tokens of a request's prompt are cached, as a JSON object: `"tokens"` (all but the last, which is computed in
/// any case), those in the `"pool"`, in the `"hot"` and in the `"cold"` tier, those `"missing"`; `"stopped_by"` why the
/// match went no further (`"complete"`, `"other_tokens"`, `"not_cached"`, `"not_identified"`: the model's files are still
/// being read, and other tiers not known); and by what has been measured so far `"restore_seconds"` and
/// `"compute_seconds"` to the first token. `request_json` is as for `omlx_generate`. Blocking while the model loads and
/// the tokenizer is read.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_TEMPLATE`, `OMLX_E_NOT_FOUND` (no such model, or not loaded).
omlx_status omlx_cache_find(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    omlx_string **text,
    omlx_error **error);

/// Brings what other tiers have of a request's prompt into the pools, so that the request itself begins sooner. `tokens`,
/// which may be NULL, receives how many are there then. Blocking until that is done.
///
/// Errors: as `omlx_cache_find`.
omlx_status omlx_cache_prefetch(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    uint64_t *tokens,
    omlx_error **error);

/// Writes what a model (all that are loaded, if `model` is NULL) has computed and no file has yet. Blocking until it is
/// on the disk, or for `timeout_ms`. Without it that happens when a model has nothing to do for five seconds, when it is
/// unloaded, and when the pool is closed.
///
/// Errors: `OMLX_E_TIMEOUT`, `OMLX_E_IO` (something could not be written), `OMLX_E_UNSUPPORTED` (the pool has no
/// `cache_dir`), `OMLX_E_NOT_FOUND` (no such model, or not loaded).
omlx_status omlx_cache_flush(omlx_pool *pool, const char *model, uint32_t timeout_ms, omlx_error **error);

/// Where rows of keys and values are kept; values may be added up.
OMLX_ENUM(omlx_cache_tier, uint32_t) {
    /// The pools that models compute with.
    OMLX_CACHE_TIER_POOLS = 1,
    /// The host's memory, where pools lie in another one.
    OMLX_CACHE_TIER_HOT = 2,
    /// Files in `omlx_pool_options.cache_dir`.
    OMLX_CACHE_TIER_COLD = 4,
};

/// Forgets what is cached of a model (of all models, if `model` is NULL) and neither in use nor pinned. `tiers` is a sum
/// of `omlx_cache_tier`, or 0 for all of them. `bytes`, which may be NULL, receives how much room that makes. What is left
/// of a model that is no longer there is forgotten by its id of before, pinned or not. Blocking while files are written and
/// removed, and while the model loads.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such model, and nothing cached of one), `OMLX_E_TIMEOUT` (files are still being written
/// after ten seconds; none was removed).
omlx_status omlx_cache_clear(
    omlx_pool *pool,
    const char *model,
    uint32_t tiers,
    uint64_t *bytes,
    omlx_error **error);

/// Limits of a pool's cache that can change while it is open. Start from `OMLX_CACHE_LIMITS_INIT`; zero leaves a limit as
/// it is, and `UINT64_MAX` in `cold_bytes_per_model` ends that one.
typedef struct omlx_cache_limits {
    /// `sizeof(omlx_cache_limits)`, set by `OMLX_CACHE_LIMITS_INIT`.
    uint32_t struct_size;
    /// As `omlx_pool_options.hot_percent`.
    uint32_t hot_percent;
    /// As `omlx_pool_options.hot_bytes`.
    uint64_t hot_bytes;
    /// As `omlx_pool_options.cold_bytes`.
    uint64_t cold_bytes;
    /// As `omlx_pool_options.cold_bytes_per_model`.
    uint64_t cold_bytes_per_model;
} omlx_cache_limits;

/// Initialiser of `omlx_cache_limits`: all defaults.
#define OMLX_CACHE_LIMITS_INIT { sizeof(omlx_cache_limits), 0, 0, 0, 0 }

/// Changes limits of a pool's cache; what is beyond them goes. Blocking while files are removed.
///
/// Errors: `OMLX_E_INVALID_ARGUMENT` (`hot_bytes` and `hot_percent` at once, or more than 100 percent),
/// `OMLX_E_UNSUPPORTED` (limits on files without a `cache_dir`).
omlx_status omlx_cache_set_limits(omlx_pool *pool, const omlx_cache_limits *limits, omlx_error **error);

/// The limits that hold, in bytes: `hot_percent` is 0, `cold_bytes` without a `cache_dir` too, and `cold_bytes_per_model` is
/// `UINT64_MAX` where there is none. `limits` starts from `OMLX_CACHE_LIMITS_INIT`.
omlx_status omlx_cache_get_limits(omlx_pool *pool, omlx_cache_limits *limits, omlx_error **error);

/// Keeps what is cached of the beginning of a request's prompt until it is unpinned: neither other requests nor
/// `omlx_cache_clear` take its place. With a `cache_dir` it is kept there too, and comes back with the model; without one
/// it goes with it. `tokens`, which may be NULL, receives for how many tokens, 0 if nothing of it can be kept; run the
/// request first, with a `max_tokens` of 1 if no answer is wanted. Pinning again adds what has been cached since.
/// `request_json` is as for `omlx_generate`. Blocking while the model loads and the tokenizer is read.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_TEMPLATE`, `OMLX_E_NOT_FOUND` (no such model, or not loaded).
omlx_status omlx_cache_pin(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    uint64_t *tokens,
    omlx_error **error);

/// Ends the pin of a request's prompt. Blocking like `omlx_cache_pin`.
///
/// Errors: as `omlx_cache_pin`, and `OMLX_E_NOT_FOUND` if it was not pinned.
omlx_status omlx_cache_unpin(
    omlx_pool *pool,
    const char *request_json,
    size_t request_len,
    omlx_error **error);

// Log -------------------------------------------------------------------------------------------------------

/// How serious a log line is.
OMLX_ENUM(omlx_log_level, uint32_t) {
    /// Something failed.
    OMLX_LOG_LEVEL_ERROR = 1,
    /// Something is not as it should be; the library copes.
    OMLX_LOG_LEVEL_WARN = 2,
    /// What a user may want to know.
    OMLX_LOG_LEVEL_INFO = 3,
    /// What a developer may want to know.
    OMLX_LOG_LEVEL_DEBUG = 4,
};

/// Receives one log line: an `omlx_log_level` and a text that lives for the call. Called on any thread, several at
/// once. It must not call the library.
typedef void (*omlx_log_fn)(void *user_data, uint32_t level, const char *message);

/// Sets the log hook of the process, which receives lines up to `max_level` (an `omlx_log_level`). NULL removes it:
/// the library is then silent; the old one may still be running, so its data is freed in its `destroy` only.
/// `user_data` and `destroy` may be NULL.
///
/// Errors: `OMLX_E_INVALID_ARGUMENT` (no such level), `OMLX_E_UNSUPPORTED` (the host is a Rust program with a
/// `tracing` subscriber of its own; the lines go there).
omlx_status omlx_set_log_hook(
    omlx_log_fn hook,
    uint32_t max_level,
    void *user_data,
    omlx_destroy_fn destroy,
    omlx_error **error);

#undef OMLX_ENUM

#ifdef __cplusplus
} // extern "C"
#endif

#endif // OMLX_H

// Python binding: functions of integers (addresses and sizes) and floats, through Python's limited API. Shapes, dtypes and
// contiguity are checked on the Python side, where the tensors are.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "kernels.h"

namespace {
using namespace diffpo;

const Kernels* choose(const char* name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(DIFFPO_AVX512_BF16)
  const Kernels* pairs = avx512 && __builtin_cpu_supports("avx512bf16") ? kernels_avx512_bf16() : nullptr;
#else
  const Kernels* pairs = nullptr;
#endif
  const Kernels* available[] = {pairs, avx512 ? kernels_avx512() : nullptr, avx2 ? kernels_avx2() : nullptr, kernels_portable()};
#else
  const Kernels* available[] = {kernels_portable()};
#endif
  for (const Kernels* k : available)
    if (k && (!name || PyOS_stricmp(name, k->name) == 0)) return k;
  return nullptr;
}

// Reads the arguments one after the other; a wrong count or type leaves a Python error set.
class Reader {
 public:
  Reader(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected) : args_(args) {
    if (count != expected) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    ok_ = count == expected;
  }
  int64_t integer() { return ok_ ? PyLong_AsLongLong(*args_++) : 0; }
  float real() { return ok_ ? static_cast<float>(PyFloat_AsDouble(*args_++)) : 0.f; }
  template <class T>
  T* pointer() { return ok_ ? static_cast<T*>(PyLong_AsVoidPtr(*args_++)) : nullptr; }
  const Kernels* kernels() { return static_cast<const Kernels*>(pointer<void>()); }
  bool ok() const { return ok_ && !PyErr_Occurred(); }

 private:
  PyObject* const* args_;
  bool ok_;
};

template <class Work>
PyObject* run(const Reader& r, const Work& work) {
  if (!r.ok()) return nullptr;
  const char* failure = nullptr;
  Py_BEGIN_ALLOW_THREADS
  try {
    work();
  } catch (const std::exception& e) {
    failure = "out of memory in a CPU kernel";
  }
  Py_END_ALLOW_THREADS
  if (failure) return PyErr_SetString(PyExc_MemoryError, failure), nullptr;
  Py_RETURN_NONE;
}

PyObject* py_kernels(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count > 1) return PyErr_SetString(PyExc_TypeError, "expected at most 1 argument"), nullptr;
  const char* name = count == 1 && args[0] != Py_None ? PyUnicode_AsUTF8AndSize(args[0], nullptr) : nullptr;
  if (PyErr_Occurred()) return nullptr;
  const Kernels* k = choose(name);
  if (!k) return PyErr_Format(PyExc_ValueError, "this processor cannot run the '%s' kernels", name), nullptr;
  return Py_BuildValue("(Ns)", PyLong_FromVoidPtr(const_cast<Kernels*>(k)), k->name);
}

PyObject* py_made_by_intel(PyObject*, PyObject* const*, Py_ssize_t) {
#if defined(__x86_64__)
  return PyBool_FromLong(__builtin_cpu_is("intel"));
#else
  Py_RETURN_FALSE;
#endif
}

LinearArgs read_linear(Reader& r) {
  LinearArgs a;
  a.x = r.pointer<float>(), a.weight = r.pointer<void>(), a.bias = r.pointer<float>(), a.y = r.pointer<float>();
  a.m = r.integer(), a.n = r.integer(), a.k = r.integer();
  a.x_row = a.k, a.x_k = 1, a.y_row = a.n, a.accumulate = false, a.chain = kChain;
  a.weight_type = static_cast<WeightType>(r.integer()), a.threads = static_cast<int>(r.integer());
  return a;
}

PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 10);
  const Kernels* k = r.kernels();
  const LinearArgs a = read_linear(r);
  return run(r, [&] { k->linear(a); });
}

// y (+)= x weight, where x and y lie in part of larger matrices or x is the transpose of what lies in memory
PyObject* py_product(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 14);
  const Kernels* k = r.kernels();
  LinearArgs a{};
  a.x = r.pointer<float>(), a.weight = r.pointer<void>(), a.y = r.pointer<float>();
  a.m = r.integer(), a.n = r.integer(), a.k = r.integer();
  a.x_row = r.integer(), a.x_k = r.integer(), a.y_row = r.integer(), a.accumulate = r.integer() != 0, a.chain = r.integer();
  a.weight_type = static_cast<WeightType>(r.integer()), a.threads = static_cast<int>(r.integer());
  return run(r, [&] { k->linear(a); });
}

PyObject* py_linear_argmax(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 13);
  const Kernels* k = r.kernels();
  const LinearArgs a = read_linear(r);
  ArgmaxArgs out;
  out.softcap = r.real(), out.index = r.pointer<int64_t>(), out.value = r.pointer<float>();
  return run(r, [&] { k->linear_argmax(a, out); });
}

PyObject* py_attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 19);
  const Kernels* k = r.kernels();
  AttentionArgs a;
  a.q = r.pointer<float>(), a.k_cache = r.pointer<float>(), a.v_cache = r.pointer<float>(), a.out = r.pointer<float>();
  a.block_table = r.pointer<int32_t>(), a.row_start = r.pointer<int32_t>(), a.first_position = r.pointer<int32_t>();
  a.sequences = r.integer(), a.table_stride = r.integer(), a.q_stride = r.integer();
  a.heads = r.integer(), a.kv_heads = r.integer(), a.head_dim = r.integer(), a.v_stride = r.integer();
  a.window = r.integer(), a.scale = r.real(), a.softcap = r.real(), a.threads = static_cast<int>(r.integer());
  return run(r, [&] { k->attention(a); });
}

PyObject* py_rope_kv_write(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 16);
  const Kernels* k = r.kernels();
  RopeArgs a;
  a.qkv = r.pointer<float>(), a.rotation = r.pointer<float>(), a.q_norm = r.pointer<float>();
  a.k_norm = r.pointer<float>(), a.k_cache = r.pointer<float>(), a.v_cache = r.pointer<float>();
  a.position = r.pointer<int64_t>(), a.slot = r.pointer<int64_t>();
  a.tokens = r.integer(), a.heads = r.integer(), a.kv_heads = r.integer(), a.head_dim = r.integer();
  a.v_stride = r.integer(), a.norm_eps = r.real(), a.threads = static_cast<int>(r.integer());
  return run(r, [&] { k->rope_kv_write(a); });
}

PyObject* py_rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 9);
  const Kernels* k = r.kernels();
  const float* x = r.pointer<float>();
  float* residual = r.pointer<float>();
  const float* weight = r.pointer<float>();
  float* out = r.pointer<float>();
  const int64_t rows = r.integer(), d = r.integer();
  const float eps = r.real();
  const int threads = static_cast<int>(r.integer());
  return run(r, [&] { k->rms_norm(x, residual, weight, out, rows, d, eps, threads); });
}

PyObject* py_gated_activation(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 7);
  const Kernels* k = r.kernels();
  const float* gate_up = r.pointer<float>();
  float* out = r.pointer<float>();
  const int64_t rows = r.integer(), width = r.integer();
  const bool gelu = r.integer() != 0;
  const int threads = static_cast<int>(r.integer());
  return run(r, [&] { k->gated_activation(gate_up, out, rows, width, gelu, threads); });
}

LossArgs read_loss(Reader& r) {
  LossArgs a;
  a.slots = r.pointer<float>(), a.kept = r.pointer<float>(), a.fresh = r.pointer<float>(), a.bias = r.pointer<float>();
  a.labels = r.pointer<int64_t>(), a.teachers = r.pointer<int64_t>(), a.scale = r.pointer<float>();
  a.state = r.pointer<LossState>();
  a.rows = r.integer(), a.targets = r.integer(), a.slot_rows = r.integer(), a.kept_rows = r.integer();
  a.v = r.integer(), a.block = r.integer();
  a.softcap = r.real(), a.temperature = r.real(), a.gradients = r.integer() != 0, a.stats = r.integer() != 0;
  a.threads = static_cast<int>(r.integer()), a.first = r.integer(), a.count = r.integer();
  return a;
}

PyObject* py_loss_statistics(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 22);
  const Kernels* k = r.kernels();
  const LossArgs a = read_loss(r);
  return run(r, [&] { k->loss_statistics(a); });
}

PyObject* py_loss_gradient(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 22);
  const Kernels* k = r.kernels();
  const LossArgs a = read_loss(r);
  return run(r, [&] { k->loss_gradient(a); });
}

PyObject* py_loss_filter(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 35);
  const Kernels* k = r.kernels();
  FilterArgs a;
  a.loss = read_loss(r);
  a.order = r.pointer<int64_t>(), a.eps = r.real(), a.noise = r.real();
  a.columns = r.pointer<int32_t>(), a.values = r.pointer<float>(), a.capacity = r.integer(), a.used = r.pointer<int64_t>();
  a.begin = r.pointer<int64_t>(), a.count = r.pointer<int64_t>(), a.stand_ins = r.pointer<int64_t>();
  a.left_out_of_row = r.pointer<float>(), a.left_out = r.pointer<float>(), a.left_out_share = r.pointer<float>();
  return run(r, [&] { k->loss_filter(a); });
}

SparseArgs read_sparse(Reader& r) {
  SparseArgs a;
  a.columns = r.pointer<int32_t>(), a.values = r.pointer<float>();
  a.begin = r.pointer<int64_t>(), a.count = r.pointer<int64_t>();
  a.dense = r.pointer<float>(), a.out = r.pointer<float>();
  a.left_out = r.pointer<float>(), a.mean = r.pointer<float>(), a.bias = r.pointer<float>();
  a.first_row = r.integer(), a.rows = r.integer(), a.d = r.integer(), a.strip = r.integer();
  a.first = r.integer(), a.count_columns = r.integer();
  a.accumulate = r.integer() != 0, a.threads = static_cast<int>(r.integer());
  return a;
}

PyObject* py_loss_sparse_hidden(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 18);
  const Kernels* k = r.kernels();
  const SparseArgs a = read_sparse(r);
  return run(r, [&] { k->loss_sparse_hidden(a); });
}

PyObject* py_loss_sparse_head(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 18);
  const Kernels* k = r.kernels();
  const SparseArgs a = read_sparse(r);
  return run(r, [&] { k->loss_sparse_head(a); });
}

PyObject* py_pack_weight(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 7);
  const void* source = r.pointer<void>();
  void* packed = r.pointer<void>();
  const int64_t rows = r.integer(), k = r.integer(), offset = r.integer();
  const auto type = static_cast<WeightType>(r.integer());
  const int threads = static_cast<int>(r.integer());
  return run(r, [&] { pack_weight(source, packed, rows, k, offset, type, threads); });
}

PyObject* py_pack_transposed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 6);
  const void* source = r.pointer<void>();
  void* packed = r.pointer<void>();
  const int64_t k = r.integer(), n = r.integer();
  const auto type = static_cast<WeightType>(r.integer());
  const int threads = static_cast<int>(r.integer());
  return run(r, [&] { pack_transposed(source, packed, k, n, type, threads); });
}

PyObject* py_embed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader r(args, count, 7);
  const int64_t* ids = r.pointer<int64_t>();
  const void* packed = r.pointer<void>();
  float* out = r.pointer<float>();
  const int64_t n = r.integer(), k = r.integer();
  const float scale = r.real();
  const auto type = static_cast<WeightType>(r.integer());
  return run(r, [&] { embed(ids, packed, out, n, k, scale, type); });
}

#define DIFFPO_METHOD(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_##name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {DIFFPO_METHOD(kernels),       DIFFPO_METHOD(linear),   DIFFPO_METHOD(linear_argmax),
                         DIFFPO_METHOD(attention),     DIFFPO_METHOD(rope_kv_write), DIFFPO_METHOD(rms_norm),
                         DIFFPO_METHOD(gated_activation), DIFFPO_METHOD(pack_weight), DIFFPO_METHOD(pack_transposed),
                         DIFFPO_METHOD(embed),         DIFFPO_METHOD(product),     DIFFPO_METHOD(made_by_intel),
                         DIFFPO_METHOD(loss_statistics), DIFFPO_METHOD(loss_gradient),
                         DIFFPO_METHOD(loss_filter),   DIFFPO_METHOD(loss_sparse_hidden), DIFFPO_METHOD(loss_sparse_head),
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_cpu", "CPU kernels of engine.kernels.", -1, methods,
                                 nullptr, nullptr, nullptr, nullptr};
}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module_definition); }

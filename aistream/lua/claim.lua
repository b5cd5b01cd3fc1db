-- The right to generate: given to a session's first viewer, or to whoever finds the lease of a running one lapsed.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 deadlines zset, 5 tick hash
-- ARGV  1 id, 2 worker, 3 nonce of this claim, 4 lease in ms, 5 seconds to keep what is owed, 6 'open': a pending session,
--       'recover': also a running one whose lease has lapsed, 'confirm': only what this nonce has claimed already,
--       7 prefix of the subjects' zsets of pending sessions (same slot)
-- gives {'missing', ms for which the store has surely lost nothing} | {'ended', state, ending id, '1' if the log is still there}
--       | {'running', worker, '1' if it cancels without viewers} | {'pending'}
--       | {'claimed', epoch, '1' if the model may be (re-)run, cancel flag, started_at, the session's fields, the content's}
-- Atomic: two viewers must not start two generations, and `<epoch>-0` in the log is what refuses an earlier epoch's late
-- writes, so it stands there before anybody holds the new epoch. Idempotent by nonce.
local s = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'nonce', 'start', 'worker', 'ending_id', 'cancels', 'cancel', 'pending')
local state, epoch = s[1], tonumber(s[2])
local now = now_ms()
if not state then
  redis.call('ZREM', KEYS[4], ARGV[1])
  return { 'missing', sure_for(KEYS[5], now) }
end
if ENDED[state] then
  return { 'ended', state, s[6], tostring(redis.call('EXISTS', KEYS[2])) }
end
local mine = state == 'running' and s[3] == ARGV[3]
if not mine then
  if state == 'running' then
    local deadline = redis.call('ZSCORE', KEYS[4], ARGV[1])
    if ARGV[6] ~= 'recover' or (deadline and tonumber(deadline) > now) then
      return { 'running', s[5], s[7] }
    end
  elseif ARGV[6] == 'confirm' then
    return { 'pending' }
  end
  -- An epoch that said anything is never run again: a viewer has seen it. One that only started has been seen by nobody.
  local rerun = '1'
  if epoch > 1 or redis.call('XLEN', KEYS[2]) > 1 or s[8] then
    rerun = '0'
  end
  epoch = epoch + 1
  redis.call('XADD', KEYS[2], epoch .. '-0', 'start', s[4])
  if s[9] and state == 'pending' then
    redis.call('ZREM', ARGV[7] .. s[9], ARGV[1])
  end
  redis.call('HSET', KEYS[1], 'state', 'running', 'epoch', epoch, 'worker', ARGV[2], 'nonce', ARGV[3], 'rerun', rerun)
  if rerun == '1' or epoch == 1 then
    redis.call('HSET', KEYS[1], 'started_at', now)
  end
end
redis.call('ZADD', KEYS[4], now + ARGV[4], ARGV[1])
for i = 1, 3 do
  redis.call('EXPIRE', KEYS[i], ARGV[5])
end
local t = redis.call('HMGET', KEYS[1], 'rerun', 'cancel', 'started_at')
return { 'claimed', epoch, t[1], t[2] or '0', t[3], redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[3]) }
